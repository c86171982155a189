"""Personalised merging: what is stored beside one model recovers, or mixes, a model for each task or input."""

from retex_jax.personalized import dawin, dts, emr, smear, svd, t_switch, tall_mask, twin, wemoe

__all__ = [
    "dawin",
    "dts",
    "emr",
    "smear",
    "svd",
    "t_switch",
    "tall_mask",
    "twin",
    "wemoe",
]
