"""Offsets as named tensors and JSON facts, for a released file, and back."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax.numpy as jnp

from retex_jax.offsets.coding import Coded
from retex_jax.offsets.forms import (
    Affine,
    Elementwise,
    Extended,
    Factorized,
    Form,
    Product,
    Separate,
    Tied,
)
from retex_jax.typing import Array

_FORMS = {
    "elementwise": Elementwise,
    "product": Product,
    "separate": Separate,
    "extended": Extended,
    "factorized": Factorized,
    "affine": Affine,
    "tied": Tied,
}


def to_tensors(offsets: Mapping[str, Form]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Takes offsets apart.

    Args:
      offsets: by leaf name.

    Returns:
      Tensors, "leaf/field" or, of a coded field, "leaf/field/codes" and "leaf/field/scales", and so on
      for a form within a form; and by leaf what is no tensor, as JSON's types.
    """
    tensors: dict[str, Array] = {}
    facts = {name: _take_apart(name, form, tensors) for name, form in offsets.items()}
    return tensors, facts


def from_tensors(tensors: Mapping[str, Array], facts: Mapping[str, Any]) -> dict[str, Form]:
    """Undoes `to_tensors`.

    Raises:
      ValueError: if a form is unknown, what it needs is missing, or facts are none that `to_tensors` makes.
    """
    try:
        offsets = {name: _put_together(name, known, tensors) for name, known in facts.items()}
    except (AttributeError, TypeError) as error:
        raise ValueError(f"offsets: facts of no form: {error}") from error
    for name, form in offsets.items():
        if not isinstance(form, Form):
            raise ValueError(f"{name}: got a {type(form).__name__}, expected a form")
        if isinstance(form, Tied) and isinstance(offsets.get(form.owner, form), Tied):
            raise ValueError(f"{name}: its owner {form.owner!r} is missing, or is tied itself")
    return offsets


def _take_apart(name: str, value: Any, tensors: dict[str, Array]) -> Any:
    """Adds the tensors of a form's value to `tensors`, and returns the rest."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Coded):
        tensors[f"{name}/codes"], tensors[f"{name}/scales"] = value.codes, value.scales
        return {"bits": value.bits, "shape": list(value.shape)}
    kind = next((kind for kind, cls in _FORMS.items() if isinstance(value, cls)), None)
    if kind is None:
        tensors[name] = value
        return {"form": "tensor"}
    entries = {
        field.name: _take_apart(f"{name}/{field.name}", getattr(value, field.name), tensors)
        for field in fields(value)
    }
    return {"form": kind, **entries}


def _put_together(name: str, known: Any, tensors: Mapping[str, Array]) -> Any:
    try:
        if known is None or isinstance(known, str):
            return known
        if isinstance(known, list):
            return tuple(known)
        if "bits" in known:
            codes, scales = (jnp.asarray(tensors[f"{name}/{part}"]) for part in ("codes", "scales"))
            return Coded(codes, scales, known["bits"], tuple(known["shape"]))
        if known.get("form") == "tensor":
            return jnp.asarray(tensors[name])
        if known.get("form") not in _FORMS:
            raise ValueError(f"{name}: form is {known.get('form')!r}, expected {sorted(_FORMS)}")
        cls = _FORMS[known["form"]]
        values = {field.name: known[field.name] for field in fields(cls)}
    except KeyError as error:
        raise ValueError(f"{name}: {error} is missing") from error
    return cls(
        **{
            field: _put_together(f"{name}/{field}", value, tensors)
            for field, value in values.items()
        }
    )
