"""Zero-shot classifiers from class names (arXiv:2103.00020, sections 3.1.2 and 3.1.4).

Every class name is put into every prompt template. A class is the mean of the unit vectors that the
text tower gives for its prompts, scaled to length 1 and multiplied by exp(logit_scale); the bias is 0.
With images from a `ViT` whose config has `normalize`, `pooled @ kernel + bias` are CLIP's logits. All
of it is float32.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.models import layers
from retex_jax.models.clip_text import LEGACY_EOS, ClipText
from retex_jax.typing import Array, Batch, Params

SLOT = "{}"
"""Where a template takes the class name."""


def make_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Puts every class name into every template.

    Args:
      class_names: C names.
      templates: P texts; every "{}" in them becomes the class name.

    Returns:
      C * P texts: all prompts of the first class, then those of the second, ...

    Raises:
      ValueError: if there is no class or no template, or a template has no "{}"; all are listed.
    """
    problems = []
    if not class_names:
        problems.append("class_names: got none, expected at least one")
    if not templates:
        problems.append("templates: got none, expected at least one")
    problems += [
        f"templates[{i}]: {template!r} has no {SLOT!r} for the class name"
        for i, template in enumerate(templates)
        if SLOT not in template
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return [template.replace(SLOT, name) for name in class_names for template in templates]


def encode_texts(
    model: ClipText,
    params: Params,
    texts: Sequence[str],
    tokenize: Callable[[list[str]], Mapping[str, Array]],
    *,
    batch_size: int = 256,
) -> np.ndarray:
    """Encodes texts, in batches of one shape so that the tower is compiled once.

    Args:
      model: the text tower.
      params: of the tower.
      texts: n >= 1 of them.
      tokenize: texts -> {"input_ids", "attention_mask"}, [n, L] each, right-padded. Called once.
      batch_size: texts in a forward pass.

    Returns:
      [n, projection_dim], float32, not normalised.

    Raises:
      ValueError: if there is no text, `batch_size` is below 1, the tokenizer does not give n rows, or
        a text has lost its end-of-text token, for example because it was cut.
    """
    if not texts or batch_size < 1:
        raise ValueError(
            f"texts: got {len(texts)}; batch_size: got {batch_size}; expected at least one of each"
        )
    tokens = tokenize(list(texts))
    tokens = {name: np.asarray(tokens[name]) for name in ("input_ids", "attention_mask")}
    if wrong := [f"{name}: shape {x.shape}" for name, x in tokens.items() if len(x) != len(texts)]:
        raise ValueError(f"tokenize: {', '.join(wrong)}, expected {len(texts)} rows")
    end = model.config.eos_token_id
    ended = (tokens["input_ids"] == end).any(axis=1) | (end == LEGACY_EOS)
    if lost := [text for text, whole in zip(texts, ended, strict=True) if not whole]:
        raise ValueError(f"tokenize: {len(lost)} texts without token {end}, the first {lost[0]!r}")

    size = min(batch_size, len(texts))
    embeddings = []
    for start in range(0, len(texts), size):
        part = {name: x[start : start + size] for name, x in tokens.items()}
        count = len(part["input_ids"])
        # The last batch repeats a row until it has the shape of the others.
        part = {n: np.pad(x, ((0, size - count), (0, 0)), "edge") for n, x in part.items()}
        embeddings.append(np.asarray(_encode(model, params, part))[:count])
    return np.concatenate(embeddings)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: ClipText, params: Params, tokens: Batch) -> jax.Array:
    return model.apply({"params": params}, tokens).pooled


def make_head(embeddings: Array, logit_scale: Array | float) -> dict[str, jax.Array]:
    """Turns the embedded prompts of each class into a classification head.

    Args:
      embeddings: [C, P, d]: P prompts of each of C classes.
      logit_scale: CLIP's parameter, the logarithm of what multiplies the cosines.

    Returns:
      "kernel" [d, C], whose columns have the length exp(logit_scale), and "bias" [C], zeros; both
      float32.
    """
    classes = layers.l2_normalize(layers.l2_normalize(jnp.asarray(embeddings)).mean(axis=1))
    scale = jnp.exp(jnp.asarray(logit_scale, jnp.float32))
    return {"kernel": classes.T * scale, "bias": jnp.zeros(len(classes), jnp.float32)}


def zero_shot_head(
    model: ClipText,
    params: Params,
    logit_scale: Array | float,
    class_names: Sequence[str],
    templates: Sequence[str],
    tokenize: Callable[[list[str]], Mapping[str, Array]],
    *,
    batch_size: int = 256,
) -> dict[str, jax.Array]:
    """Builds a zero-shot classification head.

    Args:
      model: the text tower.
      params: of the tower, "text" of a `Clip`.
      logit_scale: "logit_scale" of a `Clip`.
      class_names: C names, in the order of the labels.
      templates: P prompts with "{}" for the class name.
      tokenize: as for `encode_texts`.
      batch_size: texts in a forward pass.

    Returns:
      The head, as `make_head` gives it.

    Raises:
      ValueError: as `make_prompts` and `encode_texts` do.
    """
    prompts = make_prompts(class_names, templates)
    embeddings = encode_texts(model, params, prompts, tokenize, batch_size=batch_size)
    return make_head(embeddings.reshape(len(class_names), len(templates), -1), logit_scale)
