"""Published archives: what a user is told to run, on archives of our own."""

import dataclasses
import hashlib
import re
import shutil
import subprocess
import tarfile

import pytest
import stand_ins

from retex_jax import data
from retex_jax.data import archives, published, registry
from retex_jax.data.archives import Archive

WITH_ARCHIVES = [name for name, spec in registry.DATA_SETS.items() if spec.archives]


def pack(tmp_path, kind, form="gztar"):
    """An archive of `rendered-sst2` as it is published, and its address and checksum."""
    source = tmp_path / "source/rendered-sst2"
    for i, split in enumerate(("train", "valid", "test")):
        stand_ins.write_folder(source / split, ("negative", "positive"), 8, seed=i)
    path = shutil.make_archive(str(tmp_path / "served"), form, source.parent)
    digits = hashlib.new(kind, (tmp_path / path).read_bytes()).hexdigest()
    return Archive(f"file://{path}", f"{kind}:{digits}")


def run(command, folder):
    folder.mkdir()
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(("kind", "form"), [("sha256", "gztar"), ("md5", "gztar"), ("md5", "zip")])
def test_command_brings_a_data_set(tmp_path, kind, form):
    for program in ("curl", *(["unzip"] if form == "zip" else ["tar"])):
        if not shutil.which(program):
            pytest.skip(f"needs {program}")
    archive, root = pack(tmp_path, kind, form), tmp_path / "data sets"
    done = run(archives.command((archive, archive), root), tmp_path / "here")
    assert done.returncode == 0, done.stderr
    task = data.load_published("rendered-sst2", root, image_size=8)
    counts = {split: len(arrays["label"]) for split, arrays in task.splits.items()}
    assert counts == {"train": 29, "val": 3, "test": 16}
    assert task.classes == ("negative", "positive")


def test_other_files_are_not_unpacked(tmp_path):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    archive = pack(tmp_path, "sha256")
    with tarfile.open(archive.url.removeprefix("file://"), "w:gz"):
        pass
    done = run(archives.command((archive,), tmp_path / "data"), tmp_path / "here")
    assert done.returncode != 0
    assert "served.tar.gz: FAILED" in done.stdout
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", WITH_ARCHIVES)
def test_dry_run_has_the_checksums(name, tmp_path):
    [line] = published.problems(name, tmp_path)
    for archive in registry.DATA_SETS[name].archives:
        assert re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", archive.checksum)
        kind, digits = archive.checksum.split(":")
        assert f"curl -LO {archive.url} && echo '{digits}  " in line and f"{kind}sum -c" in line
        assert archive.into in ("", name)


def test_every_archive_is_of_a_data_set():
    made = {value for value in vars(archives).values() if isinstance(value, tuple)}
    assert made == {registry.DATA_SETS[name].archives for name in WITH_ARCHIVES}
    without = dataclasses.replace(registry.DATA_SETS["dtd"], archives=())
    assert "sha256sum" not in published.how_to_get(without)
