"""Host memory that is filled in parts: aligned for JAX, and taken again where fresh memory would cost more."""

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

# Bytes; of the memory that JAX takes over.
_ALIGNMENT = 64


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array [*shape] that is not filled, and that JAX can take over on a CPU without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    data = np.empty(size + _ALIGNMENT, np.uint8)
    start = -data.ctypes.data % _ALIGNMENT
    return data[start : start + size].view(dtype).reshape(shape)


_thread = threading.local()


def scratch(*shape: int) -> np.ndarray:
    """Float32 memory [*shape] of this thread, which its next call takes again.

    Fresh memory of this size costs several times what is then done with it: the system clears every page.
    """
    size = math.prod(shape)
    if getattr(_thread, "scratch", np.empty(0)).size < size:
        _thread.scratch = aligned_empty([size], np.float32)
    return _thread.scratch[:size].reshape(shape)
