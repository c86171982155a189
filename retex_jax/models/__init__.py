"""Backbones: Linen modules that map a batch to `Features`.

`model.apply({"params": params}, batch, num_layers=None)` returns `Features`;
`expected_params(model)` gives the shapes and dtypes of the parameters without allocating them.
"""

import functools

import flax.linen as nn
import jax

from retex_jax.models.bert import MINILM_L6, Bert, BertConfig
from retex_jax.models.features import Features
from retex_jax.models.vit import ViT
from retex_jax.models.vit_config import CLIP_B16, CLIP_B32, CLIP_L14, DINOV2_SMALL, ViTConfig

__all__ = [
    "CLIP_B16",
    "CLIP_B32",
    "CLIP_L14",
    "DINOV2_SMALL",
    "MINILM_L6",
    "Bert",
    "BertConfig",
    "Features",
    "ViT",
    "ViTConfig",
    "expected_params",
    "init_params",
]


# Compiled, so that the forward pass, which only gives the shapes, is never run.
@functools.partial(jax.jit, static_argnums=0)
def init_params(model: nn.Module, key: jax.Array) -> dict:
    """Returns freshly initialised parameters.

    Args:
      model: a backbone of this package.
      key: a typed PRNG key.

    Returns:
      Nested dict of arrays in `model.config.param_dtype`.
    """
    return dict(model.init(key, model.example_batch())["params"])


def expected_params(model: nn.Module) -> dict:
    """Returns the shapes and dtypes of a model's parameters; nothing is allocated.

    Args:
      model: a backbone of this package.

    Returns:
      Nested dict of `jax.ShapeDtypeStruct`.
    """
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
