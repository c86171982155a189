"""Merge fine-tuned experts into one model, and recover each expert from it.

The public names; importing the package touches no device.
"""

from retex_jax import identifier, mergers, metrics, offsets, tree
from retex_jax.experts import ExpertSet, task_vectors
from retex_jax.methods import METHODS, Method

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "ExpertSet",
    "Method",
    "identifier",
    "mergers",
    "metrics",
    "offsets",
    "task_vectors",
    "tree",
]
