"""Backbones: Linen modules that map a batch to `Features`; and the models built of them.

`model.apply({"params": params}, batch, num_layers=None)` of a backbone returns `Features`; that of
`Clip` and `SequenceClassifier` returns logits. `expected_params(model)` gives the shapes and dtypes of
the parameters without allocating them.
"""

import functools

import flax.linen as nn
import jax

from retex_jax.models.bert import BERT_BASE, MINILM_L6, ROBERTA_BASE, Bert, BertConfig
from retex_jax.models.classifier import SequenceClassifier
from retex_jax.models.clip import CLIP_MODEL_B16, CLIP_MODEL_B32, CLIP_MODEL_L14, Clip
from retex_jax.models.clip_text import (
    CLIP_TEXT_B16,
    CLIP_TEXT_B32,
    CLIP_TEXT_L14,
    ClipText,
    ClipTextConfig,
)
from retex_jax.models.decoder import (
    LLAMA_3_2_1B,
    QWEN2_0_5B,
    QWEN_14B,
    SMOLLM2_135M,
    Decoder,
    DecoderConfig,
)
from retex_jax.models.features import Features
from retex_jax.models.gpt2 import GPT2, GPT2_MEDIUM, Gpt2, Gpt2Config
from retex_jax.models.interception import linear_inputs
from retex_jax.models.layers import l2_normalize
from retex_jax.models.rope import RopeScaling
from retex_jax.models.scoring import ChoiceScores, score_choices
from retex_jax.models.vit import ViT
from retex_jax.models.vit_config import CLIP_B16, CLIP_B32, CLIP_L14, DINOV2_SMALL, ViTConfig
from retex_jax.models.zero_shot import zero_shot_head

__all__ = [
    "BERT_BASE",
    "CLIP_B16",
    "CLIP_B32",
    "CLIP_L14",
    "CLIP_MODEL_B16",
    "CLIP_MODEL_B32",
    "CLIP_MODEL_L14",
    "CLIP_TEXT_B16",
    "CLIP_TEXT_B32",
    "CLIP_TEXT_L14",
    "DINOV2_SMALL",
    "GPT2",
    "GPT2_MEDIUM",
    "LLAMA_3_2_1B",
    "MINILM_L6",
    "QWEN2_0_5B",
    "QWEN_14B",
    "ROBERTA_BASE",
    "SMOLLM2_135M",
    "Bert",
    "BertConfig",
    "ChoiceScores",
    "Clip",
    "ClipText",
    "ClipTextConfig",
    "Decoder",
    "DecoderConfig",
    "Features",
    "Gpt2",
    "Gpt2Config",
    "RopeScaling",
    "SequenceClassifier",
    "ViT",
    "ViTConfig",
    "expected_params",
    "init_params",
    "l2_normalize",
    "linear_inputs",
    "score_choices",
    "zero_shot_head",
]


# Compiled, so that the forward pass, which only gives the shapes, is never run.
@functools.partial(jax.jit, static_argnums=0)
def init_params(model: nn.Module, key: jax.Array) -> dict:
    """Returns freshly initialised parameters.

    Args:
      model: a model of this package.
      key: a typed PRNG key.

    Returns:
      Nested dict of arrays in the `param_dtype` of the model's configuration.
    """
    return dict(model.init(key, model.example_batch())["params"])


def expected_params(model: nn.Module) -> dict:
    """Returns the shapes and dtypes of a model's parameters; nothing is allocated.

    Args:
      model: a model of this package.

    Returns:
      Nested dict of `jax.ShapeDtypeStruct`.
    """
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
