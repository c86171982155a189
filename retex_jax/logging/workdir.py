"""One run, one workdir: the lock, and what the run has used."""

import fcntl
import json
import os
import resource
import socket
import sys
from pathlib import Path
from types import TracebackType

from retex_jax.logging import terminal

FILE = ".lock"


class WorkdirLock:
    """Holds a workdir for this run: `with WorkdirLock(workdir): ...`.

    The operating system drops the lock when the process ends, however it ends; the file stays and
    means nothing by itself. In a multi-process run process 0 holds it.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        """Names the workdir; it is created and locked on entry."""
        self._path = Path(workdir) / FILE
        self._descriptor: int | None = None

    def __enter__(self) -> "WorkdirLock":
        """Takes the lock.

        Raises:
          RuntimeError: if another run holds it.
        """
        if not terminal.is_lead():
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise RuntimeError(
                f"workdir {self._path.parent} is in use by another run ({holder}): "
                "wait for it, or choose another workdir"
            ) from error
        except OSError:
            os.close(descriptor)
            raise
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        os.ftruncate(descriptor, 0)
        os.write(descriptor, holder.encode())
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Releases the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def peak_rss_bytes() -> int:
    """Returns the largest resident memory of this process so far."""
    try:
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):  # of this program; getrusage also counts its parent's
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
