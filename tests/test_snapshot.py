"""Tests of opening snapshots: folders, shards, configs, and what is refused."""

import json
import shlex
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from retex_jax.snapshot.folder import Snapshot

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
}
CONFIG = {"model_type": "bert", "hidden_size": 4}


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
        snapshot = Snapshot(source)
        assert_same(snapshot, TENSORS)
        assert len(snapshot) == 2 and snapshot.specs["b"].dtype == ml_dtypes.bfloat16
        assert snapshot.config is None
        np.testing.assert_array_equal(snapshot.read("a"), TENSORS["a"])


def test_shards(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert_same(Snapshot(tmp_path), TENSORS)
    assert Snapshot(tmp_path).require_config() == CONFIG


def test_the_config_is_parsed_once_and_missed_where_it_is_needed(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{tmp_path}: there is no config\.json"):
        Snapshot(tmp_path).require_config()
    for text, message in (("{", "not JSON"), ("[]", "expected a JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Snapshot(tmp_path)


def test_missing_folder_and_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        Snapshot(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor .*json$"):
        Snapshot(tmp_path)
    write_shards(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"one\.safetensors, two\.safetensors"):
        Snapshot(tmp_path)


def test_another_file_name_is_suggested(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"give that file's path: open_clip_model\.saf"):
        Snapshot(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    write_shards(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(ValueError, match=r"two\.safetensors: lacks c\n.*two.*: holds b, which"):
        Snapshot(tmp_path)
    write_index(tmp_path, {"a": "two.safetensors", "b": "two.safetensors"})
    with pytest.raises(ValueError, match=r"two\.safetensors: lacks a$"):
        Snapshot(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../one.safetensors", "/etc/passwd", "..", ".", "a/one.safetensors", "..\\one", "x\0y"],
)
def test_an_index_cannot_point_elsewhere(tmp_path, shard):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    write_shards(folder)
    safetensors.numpy.save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    write_index(folder, {"a": shard, "b": "two.safetensors"})
    with pytest.raises(ValueError, match="shards outside the folder"):
        Snapshot(folder)


def test_a_link_may_lead_into_the_hub_cache_but_not_elsewhere(tmp_path):
    folder, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    write_shards(folder)
    for name in ("one", "two"):
        (folder / f"{name}.safetensors").rename(blobs / name)
        (folder / f"{name}.safetensors").symlink_to(f"../../blobs/{name}")
    assert_same(Snapshot(folder), TENSORS)
    (blobs / "two").rename(tmp_path / "two")
    (folder / "two.safetensors").unlink()
    (folder / "two.safetensors").symlink_to(tmp_path / "two")
    with pytest.raises(ValueError, match=r"outside the folder: 'two\.safetensors'"):
        Snapshot(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "x", "a": "y"}}',
    ],
)
def test_what_is_not_an_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="expected a JSON object with a weight_map"):
        Snapshot(tmp_path)


def test_problems_of_all_shards_are_listed(tmp_path):
    write_shards(tmp_path)
    for name in ("one", "two"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"(?s)one\.safetensors: not a whole.*two\.saf.*whole"):
        Snapshot(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "m.pth", "m.ckpt"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"never opened")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match="refused, because these are pickle files") as error:
            Snapshot(source)
        assert "weights_only=True" in str(error.value)
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors")
    assert_same(Snapshot(tmp_path), TENSORS)


def test_a_trainers_pickles_are_no_weights(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        Snapshot(tmp_path)


@pytest.mark.torch
def test_the_command_of_the_refusal_converts(tmp_path):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "it's here"
    folder.mkdir()
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": shared}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": shared.T}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ValueError) as error:
        Snapshot(folder)
    command = shlex.split(str(error.value).splitlines()[-1])
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], check=True)
    want = shared.numpy()
    assert_same(Snapshot(folder), {"a": want, "b": want.T})
