"""Data sets prepared by tensorflow-datasets (array_record, without TensorFlow), and parquet files of the hub.

Both libraries are optional and imported where they are needed. Nothing is downloaded.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retex_jax.data.decoding import Open, Read
from retex_jax.data.folders import Part, Source
from retex_jax.data.wheels import cache_dir

_INFO = "dataset_info.json"


def data_root(root: str | os.PathLike = "") -> Path:
    """Where data sets lie: `root`, or datasets in the cache folder."""
    return Path(root) if root else cache_dir() / "datasets"


def find_tfds(name: str, root: str | os.PathLike) -> Path | None:
    """The folder ROOT/NAME[/CONFIGURATION]/VERSION of the newest version, or None.

    Args:
      name: "NAME" or "NAME/CONFIGURATION".
      root: see `data_root`; $TFDS_DATA_DIR is looked through besides.
    """
    for folder in (data_root(root), os.environ.get("TFDS_DATA_DIR")):
        found = [path.parent for path in Path(folder, name).glob(f"*/{_INFO}")] if folder else []
        if found:
            return max(found, key=lambda folder: [int(n) for n in _numbers(folder.name)])
    return None


def open_tfds(folder: Path, splits: Sequence[str]) -> Any:
    """Opens a data set that tensorflow-datasets prepared as array_record.

    Args:
      folder: from `find_tfds`.
      splits: those that are needed.

    Returns:
      Its builder, with `as_data_source` and `info`.

    Raises:
      ImportError: if tensorflow-datasets or array_record is not installed.
      ValueError: if the files have another format, or splits are missing.
    """
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(f"{folder}: needs pip install 'retex_jax[tfds]' ({error})") from error
    builder = tensorflow_datasets.builder_from_directory(folder)
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise ValueError(
            f"{folder}: expected files of the format array_record, got {file_format}; prepare it with "
            "--file_format=array_record"
        )
    check_splits(folder, splits, builder.info.splits)
    return builder


def read_tfds(folder: Path, train: Sequence[str], test: Sequence[str]) -> Source:
    """Opens a data set of images that tensorflow-datasets prepared.

    Args:
      folder: from `find_tfds`.
      train: names of splits.
      test: names of splits; none: all examples are of `train`, and are called "all".

    Returns:
      The source.

    Raises:
      ImportError: as `open_tfds`.
      ValueError: as `open_tfds`.
    """
    builder = open_tfds(folder, [*train, *test])

    def part(splits: Sequence[str]) -> Part:
        def labels() -> np.ndarray:
            sources = _tfds_sources(folder, splits)
            found = [source[i]["label"] for source in sources for i in range(len(source))]
            return np.array(found, np.int64)

        return Part(labels, lambda: partial(_open_tfds_images, folder, tuple(splits)))

    parts = {"train": part(train), "test": part(test)} if test else {"all": part(train)}
    return Source(tuple(builder.info.features["label"].names), parts, str(folder), is_checked=True)


def _tfds_sources(folder: Path, splits: Sequence[str]) -> list[Any]:
    """The examples of each split, images not decoded."""
    builder = open_tfds(folder, splits)
    import tensorflow_datasets as tfds

    skip = {
        name: tfds.decode.SkipDecoding()
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return [builder.as_data_source(split, decoders=skip) for split in splits]


def _open_tfds_images(folder: Path, splits: Sequence[str]) -> Read:
    return _joined(_tfds_sources(folder, splits), "image")


def find_parquet(folder: str | os.PathLike, configuration: str = "") -> dict[str, list[Path]]:
    """The parquet files of each split below a folder of a hub repository.

    Both layouts of the hub: CONFIGURATION/SPLIT/0000.parquet, as its branch refs/convert/parquet has
    them, and SPLIT-00000-of-00001.parquet in any folder.

    Args:
      folder: as `hf download` leaves it.
      configuration: only files below a folder of this name; "": all.

    Raises:
      ValueError: naming the shards SPLIT-*-of-* that are missing.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).rglob("*.parquet")):
        above = path.relative_to(folder).parts[:-1]
        if configuration and configuration not in above:
            continue
        split = path.name.partition("-")[0] if "-" in path.name else (*above[-1:], "")[0]
        files.setdefault(split.removeprefix("partial_").removeprefix("partial-"), []).append(path)
    missing = [
        shard for paths in files.values() for shard in _shards(paths[0]) if not shard.is_file()
    ]
    if missing:
        raise ValueError(f"{folder}: shards missing: {', '.join(map(str, missing))}")
    return files


def _shards(path: Path) -> list[Path]:
    """All shards of the split that a file of the form SPLIT-00000-of-00002.parquet is of; else none."""
    found = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", path.stem)
    if not found:
        return []
    split, count = found.groups()
    return [path.with_name(f"{split}-{i:05}-of-{count}.parquet") for i in range(int(count))]


def hub_command(
    repository: str, folder: str | os.PathLike, configuration: str = "", revision: str = ""
) -> str:
    """The command that downloads a data set of the hub, or one configuration of it, into a folder."""
    revision = f" --revision {revision}" if revision else ""
    include = f" --include '{configuration}/*'" if configuration else ""
    return f"hf download {repository} --repo-type dataset{revision}{include} --local-dir {folder}"


def tfds_command(name: str, root: str | os.PathLike) -> str:
    """The command by which tensorflow-datasets prepares a data set."""
    return f"tfds build {name} --file_format=array_record --data_dir={data_root(root)}"


def read_parquet(
    folder: Path, configuration: str, train: Sequence[str], test: Sequence[str]
) -> Source:
    """Opens parquet files of the hub by the `datasets` library.

    Args:
      folder: with the files; the library's own cache is kept below it, in .cache.
      configuration: as for `find_parquet`.
      train: names of splits.
      test: names of splits; none: as for `read_tfds`.

    Returns:
      The source.

    Raises:
      ImportError: if `datasets` is not installed.
      ValueError: if splits are missing, or there is not one column of images and one of labels.
    """
    try:
        import datasets
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{folder}: needs pip install 'retex_jax[datasets]' ({error})") from error
    files = find_parquet(folder, configuration)
    check_splits(folder, [*train, *test], files)
    schema = parquet.read_schema(files[train[0]][0])
    features = datasets.Features.from_arrow_schema(schema)
    image, label = _columns(str(folder), features, datasets)

    def values(split: str) -> list[Any]:
        tables = [parquet.read_table(path, columns=[label]) for path in files[split]]
        return [value for table in tables for value in table[label].to_pylist()]

    kind = features[label]
    if isinstance(kind, datasets.ClassLabel):
        classes, index = tuple(kind.names), None
    else:
        index = {value: i for i, value in enumerate(sorted({*values(train[0])}))}
        classes = tuple(str(value) for value in index)

    def part(splits: Sequence[str]) -> Part:
        def labels() -> np.ndarray:
            found = [value for split in splits for value in values(split)]
            return np.array([index.get(v, -1) for v in found] if index else found, np.int64)

        def images() -> Open:
            tables = [
                datasets.Dataset.from_parquet(
                    [str(path) for path in files[split]],
                    cache_dir=str(folder / ".cache"),
                    columns=[image],
                    split=split,
                )
                for split in splits
            ]
            written = [file["filename"] for table in tables for file in table.cache_files]
            return partial(_open_arrow_images, tuple(written), image)

        return Part(labels, images)

    parts = {"train": part(train), "test": part(test)} if test else {"all": part(train)}
    return Source(classes, parts, str(folder), is_checked=True)


def _open_arrow_images(files: Sequence[str], column: str) -> Read:
    """Maps the Arrow files that `datasets` has written; it takes seconds to import, and is not needed to read them."""
    import pyarrow

    tables = [pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all() for file in files]
    read = _joined([table[column] for table in tables])
    return lambda i: read(i)["bytes"].as_py()


def _columns(where: str, features: Any, datasets: Any) -> tuple[str, str]:
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    preferred = [name for name in ("label", "fine_label", "labels") if name in features]
    labels = preferred[:1] or named
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{where}: expected one column of images and one of labels, got {dict(features)}"
        )
    return images[0], labels[0]


def _joined(sources: Sequence[Any], *path: str) -> Read:
    """Reads one entry of the examples of several sources, one after the other."""
    ends = np.cumsum([len(source) for source in sources])

    def read(i: int) -> Any:
        k = int(np.searchsorted(ends, i, side="right"))
        entry = sources[k][i - (int(ends[k - 1]) if k else 0)]
        for name in path:
            entry = entry[name]
        return entry

    return read


def check_splits(where: str | os.PathLike, wanted: Iterable[str], found: Iterable[str]) -> None:
    """Makes sure that splits are there.

    Raises:
      ValueError: naming those that are not.
    """
    missing = [split for split in wanted if split not in found]
    if missing:
        raise ValueError(f"{where}: splits {missing} missing, found {sorted(found)}")


def _numbers(version: str) -> Iterator[str]:
    return (part if part.isdigit() else "0" for part in version.split("."))
