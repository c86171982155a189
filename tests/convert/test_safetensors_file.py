"""Tests of reading safetensors snapshots."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from retex_jax.convert import safetensors_file

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape
        assert got[name].tobytes() == x.tobytes()


def write_shards(folder):
    safetensors.numpy.save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    safetensors.numpy.save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "two.safetensors"})


def write_index(folder, weight_map):
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_bytes_file_and_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(TENSORS, path)
    for source in (path.read_bytes(), path, str(path), tmp_path):
        assert_same(safetensors_file.read(source), TENSORS)


def test_shards(tmp_path):
    write_shards(tmp_path)
    assert_same(safetensors_file.read(tmp_path), TENSORS)


@pytest.mark.parametrize("length", [0, 4, 20, -1])
def test_truncated(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.numpy.save(TENSORS)[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        safetensors_file.read(tmp_path)


def test_missing_file_folder_and_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        safetensors_file.read(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds neither"):
        safetensors_file.read(tmp_path)
    write_shards(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"one\.safetensors, two\.safetensors"):
        safetensors_file.read(tmp_path)


def test_bad_indices(tmp_path):
    write_shards(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(ValueError, match=r"two\.safetensors: lacks c"):
        safetensors_file.read(tmp_path)
    write_index(tmp_path, {"a": "../one.safetensors"})
    with pytest.raises(ValueError, match="outside the folder"):
        safetensors_file.read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object with a weight_map"):
        safetensors_file.read(tmp_path)
