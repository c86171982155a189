"""Offsets as named tensors and JSON facts, for a released file, and back."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax.numpy as jnp

from retex_jax.offsets.coding import Coded
from retex_jax.offsets.forms import Elementwise, Form, Product, Separate
from retex_jax.typing import Array

_FORMS = {"elementwise": Elementwise, "product": Product, "separate": Separate}


def to_tensors(offsets: Mapping[str, Form]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Takes offsets apart.

    Args:
      offsets: by leaf name.

    Returns:
      Tensors, "leaf/field" or, of a coded field, "leaf/field/codes" and "leaf/field/scales"; and by leaf
      what is no tensor, as JSON's types.
    """
    tensors: dict[str, Array] = {}
    facts: dict[str, Any] = {}
    for name, form in offsets.items():
        kind = next(kind for kind, cls in _FORMS.items() if isinstance(form, cls))
        facts[name] = {"form": kind}
        for field in fields(form):
            value = getattr(form, field.name)
            if isinstance(value, Coded):
                tensors[f"{name}/{field.name}/codes"] = value.codes
                tensors[f"{name}/{field.name}/scales"] = value.scales
                facts[name][field.name] = {"bits": value.bits, "shape": list(value.shape)}
            elif field.metadata.get("static"):
                facts[name][field.name] = list(value) if isinstance(value, tuple) else value
            else:
                tensors[f"{name}/{field.name}"] = value
    return tensors, facts


def from_tensors(tensors: Mapping[str, Array], facts: Mapping[str, Any]) -> dict[str, Form]:
    """Undoes `to_tensors`.

    Raises:
      ValueError: if a form is unknown, or what it needs is missing.
    """
    offsets: dict[str, Form] = {}
    for name, known in facts.items():
        if known.get("form") not in _FORMS:
            raise ValueError(f"{name}: form is {known.get('form')!r}, expected {sorted(_FORMS)}")
        values = {}
        try:
            for field in fields(_FORMS[known["form"]]):
                fact = known.get(field.name)
                if isinstance(fact, Mapping):
                    parts = [tensors[f"{name}/{field.name}/{part}"] for part in ("codes", "scales")]
                    values[field.name] = Coded(
                        *map(jnp.asarray, parts), fact["bits"], tuple(fact["shape"])
                    )
                elif field.metadata.get("static"):
                    values[field.name] = tuple(fact) if isinstance(fact, list) else fact
                else:
                    values[field.name] = jnp.asarray(tensors[f"{name}/{field.name}"])
        except KeyError as error:
            raise ValueError(f"{name}: {error} is missing") from error
        offsets[name] = _FORMS[known["form"]](**values)
    return offsets
