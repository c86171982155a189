"""Mergers: experts in, one merged model out."""

from retex_jax.mergers import average, task_arithmetic, ties

MERGERS = {
    "weight_average": average.fit,
    "task_arithmetic": task_arithmetic.fit,
    "ties": ties.fit,
}
"""Name to `fit(experts, *, key, ...) -> merged params`."""

__all__ = ["MERGERS", "average", "task_arithmetic", "ties"]
