"""Identifiers: which task does an input of unknown task belong to?"""

from retex_jax.identifier import subspace

__all__ = ["subspace"]
