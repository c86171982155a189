"""Mergers: experts in, one merged model out."""

from retex_jax.mergers import (
    adamerging,
    average,
    consensus,
    dare,
    fisher,
    regmean,
    task_arithmetic,
    ties,
)

MERGERS = {
    "weight_average": average.fit,
    "task_arithmetic": task_arithmetic.fit,
    "ties": ties.fit,
    "consensus": consensus.fit,
    "dare": dare.fit,
}
"""Name to `fit(experts, *, key, ...) -> merged params`; those that need no data, which offsets can be based on."""

LEAFWISE = ("weight_average", "task_arithmetic")
"""Those of MERGERS that merge a leaf by itself, whatever the other leaves are."""

__all__ = [
    "LEAFWISE",
    "MERGERS",
    "adamerging",
    "average",
    "consensus",
    "dare",
    "fisher",
    "regmean",
    "task_arithmetic",
    "ties",
]
