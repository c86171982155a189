"""Memory that was freed goes back to the system, and files are read ahead."""

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from retex_jax import buffers

_SIZE, _COUNT = 50_000, 2_000  # below what the C library maps


def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no malloc_trim")
def test_freed_memory_is_given_back():
    if buffers._trim is None:
        pytest.skip("a C library without malloc_trim")
    blocks = [b"x" * (_SIZE + index) for index in range(_COUNT)]
    last = b"x" * (
        _SIZE + _COUNT
    )  # what lies behind keeps the C library from giving all back itself
    held = anonymous_bytes()
    del blocks
    buffers.give_back_freed()
    assert held - anonymous_bytes() > 0.8 * _SIZE * _COUNT
    assert last


def test_without_such_a_c_library_nothing_happens(monkeypatch):
    monkeypatch.setattr(buffers, "_trim", None)
    buffers.give_back_freed()


def test_what_is_read_ahead_is_as_it_was(tmp_path):
    path, content = tmp_path / "file", np.random.default_rng(0).bytes(3 * mmap.PAGESIZE)
    path.write_bytes(content)
    mapped = np.memmap(path, np.uint8, mode="r")
    for part in (mapped, mapped[100:9000], mapped[:0]):
        buffers.read_ahead(part)
    buffers.read_ahead(np.arange(3))  # not mapped
    assert mapped.tobytes() == content
