"""Published archives of images that are unpacked as they are, with the checksums that are published of them.

The checksums are those by which tensorflow-datasets 4.9 (url_checksums, datasets/*/checksums.tsv) and torchvision
(torchvision/datasets/rendered_sst2.py) check what they download.
"""

import os
import shlex
from pathlib import Path
from typing import NamedTuple


class Archive(NamedTuple):
    """An archive that holds images as `folders.read_folder` reads them.

    Attributes:
      url: of the file.
      checksum: "sha256:DIGITS" or "md5:DIGITS".
      into: folder below the root that it is unpacked in; "" where it holds that folder itself.
    """

    url: str
    checksum: str
    into: str = ""


SUN397 = (
    Archive(
        "https://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
        "sha256:f404130965a7ad77bed5ececc71e720ab50f3cc1e1bb257257610d38f3b928ec",
        "sun397",
    ),
    Archive(
        "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip",
        "sha256:e3311ea5f812d4cc6faef194688343d1111f6cd6f70f2c62f393c2b8d6ba1ec9",
        "sun397",
    ),
)
EUROSAT = (
    Archive(
        "http://madm.dfki.de/files/sentinel/EuroSAT.zip",
        "sha256:8ebea626349354c5328b142b96d0430e647051f26efc2dc974c843f25ecf70bd",
        "eurosat",
    ),
)
DTD = (
    Archive(
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
        "sha256:e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205",
    ),
)
RENDERED_SST2 = (
    Archive(
        "https://openaipublic.azureedge.net/clip/data/rendered-sst2.tgz",
        "md5:2384d08e9dcfa4bd55b324e610496ee5",
    ),
)
BEANS = tuple(
    Archive(f"https://storage.googleapis.com/ibeans/{part}.zip", f"sha256:{digits}", "beans")
    for part, digits in (
        ("train", "284fe8456ce20687f4367ae7ad94a64577e7f9fde2c2c6b1c74340ab5dc82715"),
        ("validation", "90b7aa1c26d91d9afff07a30bbc67a5ea34f1f1397f068d8675be09d7d0c602d"),
        ("test", "ca67b15d960d1e2fd9d23fd8498ce86818ead90755c630a43baf19ec4af09312"),
    )
)


def command(archives: tuple[Archive, ...], root: str | os.PathLike) -> str:
    """The command that downloads archives, compares each with its checksum and only then unpacks it.

    Args:
      archives: one or more.
      root: the folder of the data sets.
    """
    return " && ".join(_command(archive, Path(root, archive.into)) for archive in archives)


def _command(archive: Archive, folder: Path) -> str:
    file, into = archive.url.rpartition("/")[2], shlex.quote(str(folder))
    kind, _, digits = archive.checksum.partition(":")
    unpack = f"unzip -qo {file} -d" if file.endswith(".zip") else f"tar xf {file} -C"
    return (
        f"curl -LO {archive.url} && echo '{digits}  {file}' | {kind}sum -c && "
        f"mkdir -p {into} && {unpack} {into}"
    )
