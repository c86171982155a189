"""What the linear layers of a model read: the inputs of every Dense, caught while the model runs.

RegMean (arXiv:2212.09849, section 3) and activation-aware recovery weigh a kernel by the inputs of its
layer. `flax.linen.intercept_methods` hands out every call of every submodule, so one function serves all
models of this package, and any other model of Dense layers that reads the same batches; no model is
written twice.

What it does not see: products that are no `nn.Dense`, which are embeddings and logits tied to them; and
layers that the forward pass does not call, which is the untied `lm_head` of a decoder (features need no
logits). CLIP's and DINOv2's patch embedding is a matrix product of flattened patches, not a Dense; it is
given on request.

Numerics: inputs are caught in the dtype of the activations and returned in float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax import tree
from retex_jax.models.vit import PatchEmbed, ViT
from retex_jax.typing import Batch, Params

_STACKED = "blocks"


def linear_inputs(
    model: nn.Module, params: Params, batch: Batch, *, patch_embed: bool = False
) -> dict[str, jax.Array]:
    """Runs a model and returns the inputs of its Dense layers; may be traced, and compiled.

    Args:
      model: a model of this package, or any module that takes a batch: `model.apply({"params": ...},
        batch)`.
      params: its parameters, unrolled ("blocks_0/...", not `scan=True`).
      batch: what the model takes. Where it holds "attention_mask" [B, L], all layers but those of an
        image tower must read [B, L, in] (a token a row) or [B, in] (a sequence a row).
      patch_embed: whether the patch embedding of a ViT counts as a linear layer; its rows are patches,
        flattened like its kernel [patch, patch, 3, d].

    Returns:
      The leaf name of a kernel, as in `tree.flatten(params)`, to the inputs of its layer, [N, in],
      float32: one row a token, patch or sequence. Rows of padding (attention_mask == 0), and of
      sequences without real tokens, are zero. A layer that is called twice has the rows of both calls.

    Raises:
      ValueError: if the parameters are stacked for a scan (a scan hides its layers; see
        `stacking.unstack_blocks`), or a layer's input does not have the mask's leading axes.
    """
    stacked = [name for name in tree.flatten(params) if _STACKED in name.split("/")]
    if stacked:
        raise ValueError(
            f"params: got leaves that are stacked for scan=True, such as {stacked[0]!r}, expected the "
            "unrolled form (models.stacking.unstack_blocks)"
        )
    mask = batch.get("attention_mask")
    image_towers: list[tuple[str, ...]] = []
    caught: dict[str, list[jax.Array]] = {}

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__":
            if isinstance(module, ViT):
                image_towers.append(module.path)
            is_patches = patch_embed and isinstance(module, PatchEmbed)
            if is_patches or isinstance(module, nn.Dense):
                name = "/".join((*module.path, "kernel"))
                x = patches(args[0], module.patch_size) if is_patches else args[0]
                in_image = any(module.path[: len(path)] == path for path in image_towers)
                rows = _rows(name, x, None if in_image else mask)
                caught.setdefault(name, []).append(rows)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(intercept):
        model.apply({"params": params}, batch)
    return {name: jnp.concatenate(rows) for name, rows in sorted(caught.items())}


def patches(image: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, 3] to [B, number of patches, patch * patch * 3], patches in row-major order."""
    batch, height, width, channels = image.shape
    x = image.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def _rows(name: str, x: jax.Array, mask: Any) -> jax.Array:
    """[..., in] to [N, in], float32, with zeros where the mask is 0."""
    if mask is not None:
        real = jnp.asarray(mask) != 0
        if x.ndim == 2 and x.shape[:1] == real.shape[:1]:
            real = jnp.any(real, axis=1)
        elif x.ndim != 3 or x.shape[:2] != real.shape:
            batch, length = real.shape
            raise ValueError(
                f"{name}: its input has shape {x.shape}, but attention_mask has {real.shape}; "
                f"expected [{batch}, {length}, in] or [{batch}, in]"
            )
        x = jnp.where(real[..., None], x, 0)
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)
