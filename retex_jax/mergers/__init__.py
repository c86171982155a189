"""Mergers: experts in, one merged model out."""

from retex_jax.mergers import average, consensus, dare, task_arithmetic, ties

MERGERS = {
    "weight_average": average.fit,
    "task_arithmetic": task_arithmetic.fit,
    "ties": ties.fit,
    "consensus": consensus.fit,
    "dare": dare.fit,
}
"""Name to `fit(experts, *, key, ...) -> merged params`; none of them needs data."""

__all__ = ["MERGERS", "average", "consensus", "dare", "task_arithmetic", "ties"]
