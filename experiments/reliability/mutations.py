"""Changes of files, as a bad disk, a broken download or a hostile author makes them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEPTH = 100_000
_VALUES = (
    None,
    True,
    -1,
    0,
    0.5,
    2**31,
    2**63,
    10**40,
    1e308,
    float("nan"),
    "",
    "x" * 1000,
    "../../../etc/passwd",
    "/dev/zero",
    "..",
    "a\0b",
    [],
    {},
    [[]],
    [2**40, 2**40],
    [-1, 3],
    {"": 1},
)


def flip(data: bytes, rng: random.Random) -> bytes:
    """One to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_early(data: bytes, rng: random.Random) -> bytes:
    """One bit of the first 2,000 bytes, where headers are."""
    changed = bytearray(data)
    changed[rng.randrange(min(len(data), 2000))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    """The first bytes, or none."""
    return data[: rng.choice((0, rng.randrange(len(data)), len(data) - 1))]


def delete(data: bytes, rng: random.Random) -> bytes:
    """Without some bytes."""
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 64) :]


def insert(data: bytes, rng: random.Random) -> bytes:
    """With some bytes more."""
    start = rng.choice((0, len(data), rng.randrange(len(data))))
    return data[:start] + rng.randbytes(rng.randint(1, 64)) + data[start:]


def zero(data: bytes, rng: random.Random) -> bytes:
    """A range of zeros, as a sparse file has it."""
    start = rng.randrange(len(data))
    size = min(rng.choice((1, 64, 4096)), len(data) - start)
    return data[:start] + bytes(size) + data[start + size :]


def exchange(data: bytes, rng: random.Random) -> bytes:
    """Two ranges in each other's place."""
    size = min(rng.choice((1, 4, 64)), len(data) // 2)
    first = rng.randrange(len(data) - 2 * size + 1)
    second = rng.randrange(first + size, len(data) - size + 1)
    middle = data[first + size : second]
    swapped = data[second : second + size] + middle + data[first : first + size]
    return data[:first] + swapped + data[second + size :]


BYTES = (flip, flip, flip_early, truncate, delete, insert, zero, exchange)


def json_text(text: bytes, rng: random.Random) -> bytes:
    """JSON with one change: of a value, or a key that is there twice, or a value nested deeply."""
    value = json.loads(text)
    kind = rng.random()
    if kind < 0.1 and isinstance(value, dict) and value:
        key = json.dumps(rng.choice(list(value)))
        return b"{" + f"{key}: {rng.choice(('null', '[]', '1'))}, ".encode() + text.lstrip()[1:]
    marker = "marker of a value"
    changed = change(value, rng, marker if kind < 0.2 else rng.choice(_VALUES))
    written = json.dumps(changed).encode()
    if kind < 0.2:
        depth = rng.choice((70, 900, DEPTH))
        nested = rng.choice((b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth))
        return written.replace(json.dumps(marker).encode(), nested)
    return written


def change(value: Any, rng: random.Random, new: Any) -> Any:
    """A JSON value with another one at a random place, or without one that is there."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(list(keys))
        copy = dict(value) if isinstance(value, dict) else list(value)
        below = copy[key]
        if not isinstance(below, dict | list) and rng.random() < 0.2:
            del copy[key]
            return copy
        if isinstance(copy, dict) and rng.random() < 0.1:
            copy[rng.choice(("../x", "/etc/x", "", "a/../b", f"{key}/x", "x"))] = copy.pop(key)
            return copy
        copy[key] = change(below, rng, new)
        return copy
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.3:
        return value + rng.choice((-1, 1, 2**20, 2**40))
    return new


def header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header has one change, or claims another length."""
    if rng.random() < 0.1:
        length = rng.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + data[8:]
    length = int.from_bytes(data[:8], "little")
    changed = json_text(data[8 : 8 + length], rng)
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def swap_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file in which two tensors of one size hold each other's data."""
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    ranges = [entry["data_offsets"] for entry in entries.values()]
    pairs = [
        (one, other)
        for one in ranges
        for other in ranges
        if one < other and one[1] - one[0] == other[1] - other[0] > 0
    ]
    if not pairs:
        return flip(data, rng)
    start = 8 + length
    (a, b), (c, d) = rng.choice(pairs)
    changed = bytearray(data)
    changed[start + a : start + b] = data[start + c : start + d]
    changed[start + c : start + d] = data[start + a : start + b]
    return bytes(changed)


def mutate(folder: Path, rng: random.Random) -> str:
    """Changes one file of a folder, or which files it has; returns what was done."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(paths)
    name = str(path.relative_to(folder))
    if rng.random() < 0.05:
        return f"{_rearrange(path, paths, rng)} {name}"
    data = path.read_bytes()
    kinds: list[Callable[[bytes, random.Random], bytes]] = [rng.choice(BYTES)]
    if path.suffix == ".safetensors":
        kinds += [header, swap_tensors]
    elif path.suffix == ".json" or path.name == ".zarray":
        kinds += [json_text, json_text]
    kind = rng.choice(kinds)
    path.write_bytes(kind(data, rng))
    return f"{kind.__name__} {name}"


def _rearrange(path: Path, paths: list[Path], rng: random.Random) -> str:
    kind = rng.choice(("remove", "swap", "copy", "folder"))
    other = rng.choice(paths)
    if kind == "swap":
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
    elif kind == "copy":
        other.write_bytes(path.read_bytes())
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()
    return kind


def fresh(sample: Path, folder: Path) -> None:
    """A copy of a sample to change."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sample, folder)
