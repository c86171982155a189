"""Processes that decode images.

Threads that decode share the interpreter's lock for all that Pillow does not do without it: of small files two
processes decode half as many again as two threads, of photographs as many (experiments/benchmarks/pipeline.py). They
leave the lock to the caller's own work besides. So each process here opens the sources anew and decodes its part
of a batch into memory that it shares with the caller; only positions and errors are sent.

The processes are programs of their own, not multiprocessing's, which would import the caller's main module again, and
JAX with it. They end when the caller closes its end of the pipe, or dies; SIGINT and SIGTERM, which terminals and
schedulers send to whole groups, are the caller's to handle.
"""

import mmap
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from typing import BinaryIO

import numpy as np

from retex_jax.data.decoding import Open, decode

Sources = Mapping[int, tuple[Open, str]]
"""Number to what opens a source in another process, and its name; a number stands for one source for ever."""

Rows = Sequence[tuple[int, int]]
"""Images: numbers of their sources, and positions there."""

_PROGRAM = """
import signal, sys
for ignored in (signal.SIGINT, signal.SIGTERM):
    signal.signal(ignored, signal.SIG_IGN)
from retex_jax.data import workers
workers.serve(*map(int, sys.argv[1:]))
"""
# Of glibc: memory of decoded images is kept for the next ones, not given back each time, which is a sixth faster.
_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
_MOST_IMAGES = 16  # of one request
_REQUESTS = 4  # a process and batch, at least, so that none is left waiting for long
_PATIENCE = 10.0  # seconds for a process to end by itself


class Workers:
    """Processes that wait for images to decode; several threads may use them."""

    def __init__(self, count: int):
        """Starts processes, without waiting for them.

        Args:
          count: of the processes, 1 or more.
        """
        self._count = count
        self._all = {_Worker() for _ in range(count)}
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, "workers")

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that run."""
        return sorted(worker.process.pid for worker in self._all)

    def run(self, sources: Sources, rows: Rows, out: np.ndarray | None) -> list[str]:
        """Decodes images.

        Args:
          sources: those of the rows, and others.
          rows: n images.
          out: receives the pixels, uint8 [n, S, S, 3]; None: the images are only checked, see
            `decoding.decode`.

        Returns:
          A line for each image, "" if nothing is wrong with it.

        Raises:
          RuntimeError: if a process ends; another takes its place.
        """
        size = min(_MOST_IMAGES, -(-len(rows) // (_REQUESTS * self._count)))

        def part(start: int) -> list[str]:
            worker = self._idle.get()
            chosen = slice(start, start + size)
            try:
                return worker.run(sources, rows[chosen], None if out is None else out[chosen])
            finally:
                if worker.process.returncode is not None:
                    worker.close()
                    self._all.remove(worker)
                    worker = _Worker()
                    self._all.add(worker)
                self._idle.put(worker)

        starts = range(0, len(rows), max(size, 1))
        return [line for lines in self._threads.map(part, starts) for line in lines]

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown()
        for worker in self._all:
            worker.close()


class _Worker:
    """The caller's side of a process."""

    def __init__(self):
        self._memory = _shared_file()
        self._pixels = np.empty(0, np.uint8)
        self._known: set[int] = set()
        self._connection, theirs = multiprocessing.Pipe()
        handles = (theirs.fileno(), self._memory.fileno())
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, *map(str, handles)],
            pass_fds=handles,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**_MEMORY, **os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()

    def run(self, sources: Sources, rows: Rows, out: np.ndarray | None) -> list[str]:
        """As `Workers.run`, by this process alone."""
        new = {number: sources[number] for number in {number for number, _ in rows} - self._known}
        image_size = 0 if out is None else out.shape[1]
        if out is not None and out.nbytes > self._pixels.nbytes:
            os.ftruncate(self._memory.fileno(), out.nbytes)
            self._pixels = _mapped(self._memory.fileno())
        try:
            self._connection.send((new, rows, image_size))
            lines = self._connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(self._obituary(sources, rows)) from error
        self._known |= new.keys()
        if out is not None:
            out[...] = self._pixels[: out.nbytes].reshape(out.shape)
        return lines

    def _obituary(self, sources: Sources, rows: Rows) -> str:
        _end(self.process)
        code = self.process.returncode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        (first, start), (last, stop) = rows[0], rows[-1]
        return (
            f"a process that decodes images was ended {how}, between {sources[first][1]}[{start}] and "
            f"{sources[last][1]}[{stop}]; what it printed is above. If memory is short, fewer workers "
            "(data_sets.workers) take less, and 0 decodes in this process"
        )

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._memory.close()
        _end(self.process)


def serve(connection: int, memory: int) -> None:
    """Decodes what is asked for, until the caller's end is closed.

    Args:
      connection: file descriptor of the pipe.
      memory: file descriptor of what receives the pixels.
    """
    calls = Connection(connection)
    sources: dict[int, tuple[Open, str]] = {}
    pixels = np.empty(0, np.uint8)
    while True:
        try:
            new, rows, image_size = calls.recv()
        except (EOFError, OSError):
            return
        sources |= {
            number: (cache(open_source), name) for number, (open_source, name) in new.items()
        }
        shape = (len(rows), image_size, image_size, 3)
        size = int(np.prod(shape))
        if size > pixels.nbytes:
            pixels = _mapped(memory)
        out = pixels[:size].reshape(shape) if image_size else [None] * len(rows)
        calls.send(
            [_decode(sources[number], i, row) for (number, i), row in zip(rows, out, strict=True)]
        )


def _decode(source: tuple[Open, str], position: int, out: np.ndarray | None) -> str:
    open_source, name = source
    return decode(lambda i: open_source()(i), position, name, out)


def _shared_file() -> BinaryIO:
    """A file in memory without a name, or on disk where the system has no such."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("pixels"), "r+b", buffering=0)
    return tempfile.TemporaryFile()


def _mapped(file: int) -> np.ndarray:
    """The bytes of a whole file, shared by all that map it."""
    return np.frombuffer(mmap.mmap(file, 0), np.uint8)


def _end(process: subprocess.Popen) -> None:
    """Waits for a process to end by itself, or kills it."""
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
