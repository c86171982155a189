"""Merge fine-tuned experts into one model, and recover each expert from it.

The public names; importing the package touches no device. `Recovered`, which serves a released artefact, is
imported when it is first asked for, with the models.
"""

from typing import Any

from retex_jax import identifier, mergers, metrics, offsets, tree
from retex_jax.experts import ExpertSet, task_vectors
from retex_jax.methods import METHODS, Method

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "ExpertSet",
    "Method",
    "Recovered",
    "identifier",
    "mergers",
    "metrics",
    "offsets",
    "task_vectors",
    "tree",
]


def __getattr__(name: str) -> Any:
    if name == "Recovered":
        from retex_jax.serving import Recovered

        return Recovered
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
