"""Personalised merging: what is stored beside one model recovers a model for each task."""

from retex_jax.personalized import dts, emr, svd, t_switch, tall_mask

__all__ = ["dts", "emr", "svd", "t_switch", "tall_mask"]
