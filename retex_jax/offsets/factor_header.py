"""What the writer and the reader of a fit's file share: names in the header, and hashes."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from retex_jax.snapshot import DTYPES
from retex_jax.typing import Array

REPORTED = ("residuals", "optima", "energies")
"""The parts of a report that are in the metadata; spectra are tensors."""

SEAL = "seal"
"""The text of the metadata that holds the hash of the others."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def describe(values: Array | jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Dtype and shape, as a header has them."""
    return {"dtype": _DTYPE_NAMES[values.dtype], "shape": list(values.shape)}


def content_hash(values: np.ndarray) -> str:
    """SHA-256 of the content in C order, in hexadecimal."""
    content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return hashlib.sha256(content.data).hexdigest()


def seal(metadata: Mapping[str, str], described: Mapping[str, Any]) -> str:
    """SHA-256 of a header.

    Args:
      metadata: its texts, without the seal.
      described: tensor name to `describe`, in the order of the data.
    """
    text = json.dumps([sorted(metadata.items()), list(described.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def alias(values: np.ndarray) -> Array:
    """The same as JAX's, without a copy where it lies at a multiple of 64 bytes."""
    if jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype:
        return values
    return jax.device_put(np.asarray(values), may_alias=True)
