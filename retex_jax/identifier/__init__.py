"""Identifiers: which task does an input of unknown task belong to?"""

from retex_jax.identifier import (
    held_out,
    mahalanobis,
    neighbors,
    out_of_distribution,
    router,
    selection,
    shared_mahalanobis,
    subspace,
    weights,
)
from retex_jax.identifier.registry import IDENTIFIERS, IdentifierMethod

__all__ = [
    "IDENTIFIERS",
    "IdentifierMethod",
    "held_out",
    "mahalanobis",
    "neighbors",
    "out_of_distribution",
    "router",
    "selection",
    "shared_mahalanobis",
    "subspace",
    "weights",
]
