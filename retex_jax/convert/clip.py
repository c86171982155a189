"""Table of a whole CLIP, with the names of Hugging Face's `CLIPModel`.

The position_ids buffers of older files are read past: positions are counted, not stored.
"""

from retex_jax.convert.clip_text import CLIP_TEXT
from retex_jax.convert.engine import Rule, Table
from retex_jax.convert.prefixed import prefixed
from retex_jax.convert.vit import CLIP_VISION

CLIP = Table(
    name="CLIP",
    rules=(
        *prefixed(CLIP_VISION.rules, flax="vision/"),
        *prefixed(CLIP_TEXT.rules, flax="text/"),
        Rule("logit_scale", "logit_scale"),
    ),
    ignore=(r"(vision|text)_model\.embeddings\.position_ids",),
)
"""Hugging Face's CLIPModel <-> Clip."""
