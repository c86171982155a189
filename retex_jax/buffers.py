"""Host memory: aligned for JAX, taken again where fresh memory would cost more, given back, and read ahead."""

import ctypes
import math
import mmap
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

# Bytes; of the memory that JAX takes over.
_ALIGNMENT = 64

# Bytes from which on memory is mapped: the allocator would keep it for itself when it is freed.
_LEAST_MAPPED = 1 << 20


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array [*shape] that is not filled, and that JAX can take over on a CPU without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size >= _LEAST_MAPPED:
        return np.frombuffer(_map(size), dtype).reshape(shape)
    data = np.empty(size + _ALIGNMENT, np.uint8)
    start = -data.ctypes.data % _ALIGNMENT
    return data[start : start + size].view(dtype).reshape(shape)


def _map(size: int) -> mmap.mmap:
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)  # as NumPy does for its own
    return mapped


_thread = threading.local()


def scratch(*shape: int) -> np.ndarray:
    """Float32 memory [*shape] of this thread, which its next call takes again.

    Fresh memory of this size costs several times what is then done with it: the system clears every page.
    """
    size = math.prod(shape)
    if getattr(_thread, "scratch", np.empty(0)).size < size:
        _thread.scratch = aligned_empty([size], np.float32)
    return _thread.scratch[:size].reshape(shape)


# Of glibc; other C libraries have no malloc_trim.
_library = ctypes.CDLL(None) if sys.platform == "linux" else None
_trim = getattr(_library, "malloc_trim", None)
_advise = getattr(_library, "madvise", None)


def give_back_freed() -> None:
    """Gives the system what was freed but kept by the C library: one pool for each thread that XLA computes in.

    What a leaf took in one thread is of no use to the next leaf in another, so that the pools would add up.
    """
    if _trim is not None:
        _trim(0)


# Bytes; Linux reads no more at one call, or a few times that, as the device has it.
_READ_AHEAD = 1 << 17


def read_ahead(mapped: np.ndarray) -> None:
    """Has the system read a part of a mapped file from the disk, without waiting for it; nothing where it cannot.

    Args:
      mapped: a contiguous array in the file's memory map.
    """
    if _advise is None:
        return
    start = mapped.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    size = ctypes.c_size_t(_READ_AHEAD)
    for address in range(start, mapped.ctypes.data + mapped.nbytes, _READ_AHEAD):
        _advise(ctypes.c_void_p(address), size, mmap.MADV_WILLNEED)
