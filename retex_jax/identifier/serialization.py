"""Identifier states as named tensors and JSON facts, for a released file, and back."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from retex_jax.identifier.features import Whitening
from retex_jax.identifier.layers import Joint, Layered
from retex_jax.identifier.mahalanobis import Gaussians
from retex_jax.identifier.neighbors import Neighbors
from retex_jax.identifier.router import RouterState
from retex_jax.identifier.shared_mahalanobis import SharedGaussians
from retex_jax.identifier.subspace import Signatures
from retex_jax.personalized.router import Router
from retex_jax.typing import Array

_CLASSES = {
    "signatures": Signatures,
    "whitening": Whitening,
    "shared_gaussians": SharedGaussians,
    "gaussians": Gaussians,
    "neighbors": Neighbors,
    "router_state": RouterState,
    "router": Router,
    "layered": Layered,
    "joint": Joint,
}


def to_tensors(state: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    """Takes a state apart.

    Args:
      state: of an identifier.

    Returns:
      Tensors by "field" or "field/field", and what is no tensor, as JSON's types.
    """
    tensors: dict[str, Array] = {}
    return tensors, _take_apart("", state, tensors)


def from_tensors(tensors: Mapping[str, Array], facts: Mapping[str, Any]) -> Any:
    """Undoes `to_tensors`.

    Raises:
      ValueError: if a class is unknown, or something is missing.
    """
    try:
        return _put_together("", facts, tensors)
    except KeyError as error:
        raise ValueError(f"identifier: {error} is missing or unknown") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"identifier: facts of no state: {error}") from error


def _take_apart(name: str, value: Any, tensors: dict[str, Array]) -> Any:
    """Adds the tensors of a value to `tensors`, and returns the rest."""
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if is_dataclass(value):
        kind = next(kind for kind, cls in _CLASSES.items() if isinstance(value, cls))
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return {"class": kind, "fields": _take_parts(name, parts, tensors)}
    if isinstance(value, Mapping):
        return {"dict": _take_parts(name, value, tensors)}
    if isinstance(value, tuple):
        parts = {str(place): part for place, part in enumerate(value)}
        return {"tuple": list(_take_parts(name, parts, tensors).values())}
    tensors[name] = value
    return {"tensor": np.dtype(value.dtype).name}


def _take_parts(name: str, parts: Mapping[str, Any], tensors: dict[str, Array]) -> dict[str, Any]:
    return {part: _take_apart(_below(name, part), x, tensors) for part, x in parts.items()}


def _put_together(name: str, known: Mapping[str, Any], tensors: Mapping[str, Array]) -> Any:
    if "value" in known:
        return known["value"]
    if "tensor" in known:
        return jnp.asarray(tensors[name])
    if "tuple" in known:
        return tuple(
            _put_together(_below(name, str(place)), part, tensors)
            for place, part in enumerate(known["tuple"])
        )
    parts = known["fields"] if "class" in known else known["dict"]
    values = {
        part: _put_together(_below(name, part), inner, tensors) for part, inner in parts.items()
    }
    return _CLASSES[known["class"]](**values) if "class" in known else values


def _below(name: str, part: str) -> str:
    return f"{name}/{part}" if name else part
