"""What an unfinished fit has finished, in a text file that a later one goes on from.

A line is an entry in JSON after its SHA-256; the first is the identity of the fit. A line that was cut off, or has
changed, ends the journal: it and all that follows is forgotten.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """A journal that this process alone has open.

    Attributes:
      entries: of the earlier fit of the same identity, in order.
    """

    entries: list[dict[str, Any]]

    def __init__(self, path: Path, identity: str):
        """Opens it; one of another identity is emptied.

        Raises:
          RuntimeError: if another fit has it open.
        """
        self._path = path
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise RuntimeError(f"{path} is in use by another fit of the same file") from error
        first, *entries = self._read() or [{}]
        self.entries = entries
        if first != {"identity": identity}:
            self.entries = []
            self._file.truncate(0)
            self.append({"identity": identity})

    @classmethod
    def is_of(cls, path: Path, identity: str) -> bool:
        """Whether there is a journal of this identity."""
        if not path.exists():
            return False
        with path.open("rb") as file:
            return file.readline() == _line(json.dumps({"identity": identity}).encode())

    def append(self, entry: dict[str, Any]) -> None:
        """Writes an entry to the disk."""
        text = json.dumps(entry).encode()
        self._file.write(_line(text))
        self._file.flush()
        os.fsync(self._file.fileno())

    def keep(self, number: int) -> None:
        """Forgets all entries of the earlier fit but the first ones."""
        self.entries = self.entries[:number]
        self._file.seek(0)
        lines = self._file.readlines()[: 1 + number]
        self._file.truncate(sum(map(len, lines)))

    def remove(self) -> None:
        """Removes the file: the fit is finished."""
        self._path.unlink()

    def close(self) -> None:
        """Gives the file free; it stays."""
        self._file.close()

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; what follows them is cut off."""
        self._file.seek(0)
        entries, size = [], 0
        for line in self._file:
            text = line.partition(b" ")[2].removesuffix(b"\n")
            if line != _line(text):
                break
            entries.append(json.loads(text))
            size += len(line)
        self._file.truncate(size)
        return entries


def _line(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"
