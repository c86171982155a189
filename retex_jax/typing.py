"""Names for the types that the package passes around."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Mapping[str, Any]
"""A nested dict of arrays."""

FlatParams = dict[str, Array]
"""Leaf name "a/b/c" to array, sorted by name."""

Batch = Mapping[str, Array]
"""Arrays that share their leading (batch) axis."""

Layout = Literal["flax", "torch"]
"""Which axis of a kernel is the output: flax kernels are (in, out), torch weights (out, in)."""

ProgressFn = Callable[[int, int], None]
"""Called with (done, total) while a long computation goes on."""
