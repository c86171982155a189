import json
import os
import signal
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from retex_jax import artifact, files


def _tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "merged/kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "merged/bias": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
        "codes": rng.integers(0, 256, (5, 2)).astype(np.uint8),
        "ids": np.arange(4, dtype=np.int64),
        "scale": jnp.asarray(0.5),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 2), np.float32),
        "strided": np.arange(12.0).reshape(3, 4).T,
        "swapped": np.arange(3, dtype=">f4"),
    }


def _saved(tmp_path):
    artifact.save(tmp_path, _tensors(), {"names": ["a"]})
    return tmp_path / "artifact.safetensors", tmp_path / "manifest.json"


def _rewrite_manifest(path, change):
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = files.json_hash(manifest)
    path.write_text(json.dumps(manifest))


def test_round_trip(tmp_path):
    tensors = _tensors()
    written = artifact.save(tmp_path / "new", tensors, {"rank": 8, "names": ["a", "ü"]})
    found = artifact.load(tmp_path / "new")
    assert found.metadata == {"rank": 8, "names": ["a", "ü"]}
    assert list(found.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        want = np.asarray(tensor).astype(np.asarray(tensor).dtype.newbyteorder("="))
        assert found.tensors[name].dtype == want.dtype
        assert found.tensors[name].shape == want.shape
        np.testing.assert_array_equal(found.tensors[name], want)
    files = list((tmp_path / "new").iterdir())
    assert sorted(path.name for path in files) == ["artifact.safetensors", "manifest.json"]
    assert written == sum(path.stat().st_size for path in files)


def test_equal_input_gives_equal_files(tmp_path):
    tensors = _tensors()
    artifact.save(tmp_path / "a", tensors, {"x": 1})
    artifact.save(tmp_path / "b", dict(reversed(tensors.items())), {"x": 1})
    for name in ("artifact.safetensors", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_each_flipped_byte_is_caught(tmp_path):
    path, manifest = _saved(tmp_path)
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ValueError, match=r"artifact\.safetensors doesn't match"):
            artifact.load(tmp_path)
    path.write_bytes(data)
    text = manifest.read_bytes()
    for position in range(0, len(text), 7):
        manifest.write_bytes(text[:position] + bytes([text[position] ^ 1]) + text[position + 1 :])
        with pytest.raises(ValueError, match="manifest"):
            artifact.load(tmp_path)
    manifest.write_bytes(text)
    artifact.load(tmp_path)


def test_flipped_content_names_the_tensor_only(tmp_path):
    path, _ = _saved(tmp_path)
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + header])
    for name, entry in table.items():
        begin, end = entry["data_offsets"]
        if begin == end:
            continue
        changed = bytearray(data)
        changed[8 + header + begin] ^= 128
        path.write_bytes(changed)
        with pytest.raises(ValueError) as error:
            artifact.load(tmp_path)
        assert str(error.value).splitlines()[1:] == [
            f"  tensor {name!r}: its content hash is wrong"
        ]


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_file(tmp_path, keep):
    path, _ = _saved(tmp_path)
    size = path.stat().st_size
    keep = keep % size
    os.truncate(path, keep)
    with pytest.raises(ValueError, match=f"has {keep} bytes, expected {size}"):
        artifact.load(tmp_path)


def test_missing_extra_and_changed_tensors_are_listed_together(tmp_path):
    path, _ = _saved(tmp_path)
    tensors = safetensors.numpy.load_file(path)
    del tensors["codes"]
    tensors["extra"] = np.ones(2)
    tensors["ids"] = tensors["ids"].astype(np.int32)
    tensors["merged/kernel"] = tensors["merged/kernel"].T.copy()
    artifact.save_safetensors(path, tensors)
    with pytest.raises(ValueError) as error:
        artifact.load(tmp_path)
    for text in (
        "tensor 'codes': missing",
        "tensor 'extra': not in the manifest",
        "tensor 'ids': dtype is int32, expected int64",
        "tensor 'merged/kernel': shape is [3, 4], expected [4, 3]",
    ):
        assert text in str(error.value)
    assert "'scale'" not in str(error.value)


def test_manifest_is_checked(tmp_path):
    path, manifest = _saved(tmp_path)
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ValueError, match="schema is 2, expected 1"):
        artifact.load(tmp_path)
    for broken in ("", "[]", "{}", text[:-20]):
        manifest.write_text(broken)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            artifact.load(tmp_path)
    manifest.unlink()
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"manifest\.json and artifact\.safetensors missing"
    ):
        artifact.load(tmp_path)


def test_files_of_two_artifacts_do_not_mix(tmp_path):
    _, manifest = _saved(tmp_path)
    old = manifest.read_bytes()
    artifact.save(tmp_path, _tensors(1), {})
    artifact.load(tmp_path)
    manifest.write_bytes(old)
    with pytest.raises(ValueError, match="'merged/kernel': its content hash is wrong"):
        artifact.load(tmp_path)


def test_header_is_covered(tmp_path):
    path, manifest = _saved(tmp_path)
    size = path.stat().st_size
    artifact.save_safetensors(path, _tensors(), {"note": "another header"})
    change = {"bytes": path.stat().st_size}
    assert change["bytes"] != size
    _rewrite_manifest(manifest, lambda body: body["file"].update(change))
    with pytest.raises(ValueError, match="header isn't the one"):
        artifact.load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {}, "tensors: got none"),
        ({"a": np.array(["x"])}, {}, "'a' has dtype <U1"),
        ({"a": np.array([None])}, {}, "'a' has dtype object"),
        ({"a": np.ones(2, np.complex64)}, {}, "'a' has dtype complex64"),
        ({"a": np.ones(2, ml_dtypes.float8_e4m3fn)}, {}, "'a' has dtype float8_e4m3fn"),
        ({"": np.ones(2)}, {}, "name '' isn't allowed"),
        ({"__metadata__": np.ones(2)}, {}, "isn't allowed"),
        ({"a": np.ones(2)}, {"x": float("inf")}, "metadata"),
        ({"a": np.ones(2)}, {"x": object()}, "metadata"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, tensors, metadata, message):
    with pytest.raises(ValueError, match=message):
        artifact.save(tmp_path / "new", tensors, metadata)
    assert not (tmp_path / "new").exists()


def test_save_safetensors_is_readable_elsewhere_and_atomic(tmp_path, monkeypatch):
    path = tmp_path / "expert.safetensors"
    size = artifact.save_safetensors(path, {"a": jnp.arange(3.0)}, {"task": "mnist"})
    assert size == path.stat().st_size
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"task": "mnist"}
        np.testing.assert_array_equal(file.get_tensor("a"), [0.0, 1.0, 2.0])
    before = path.read_bytes()

    def interrupted(tensors, name, metadata=None):
        name.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
    with pytest.raises(OSError, match="no space"):
        artifact.save_safetensors(path, {"a": jnp.arange(4.0)})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=r"metadata: values of \['n'\] aren't strings"):
        artifact.save_safetensors(path, {"a": jnp.arange(4.0)}, {"n": 1})  # type: ignore


def test_write_json(tmp_path):
    path = tmp_path / "results.json"
    assert artifact.write_json(path, {"b": [1, None, "ü"], "a": 0.5}) == path.stat().st_size
    assert json.loads(path.read_text("utf-8")) == {"b": [1, None, "ü"], "a": 0.5}
    with path.open(encoding="utf-8") as reader:  # opened before the file was replaced
        artifact.write_json(path, {"a": 0.25})
        assert json.load(reader)["a"] == 0.5
    for value in ({"x": float("nan")}, {"x": np.float32(1)}, {"x": {1, 2}}):
        with pytest.raises(ValueError, match=r"results\.json: expected finite JSON"):
            artifact.write_json(path, value)
    assert json.loads(path.read_text("utf-8"))["a"] == 0.25
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("artifact.save_safetensors = die", "old"),
        ("artifact.write_json = die", "old"),
        ("artifact.write_json = lambda *args: die(write_json(*args))", "new"),
    ],
)
def test_kill_leaves_the_old_artifact_or_the_new_one(tmp_path, change, kept):
    _saved(tmp_path)
    old = artifact.load(tmp_path)
    code = """
        import os, signal, sys
        import numpy as np
        from retex_jax import artifact
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write_json = artifact.write_json
        exec(sys.argv[2])
        artifact.save(sys.argv[1], {"a": np.ones(3)}, {"new": True})
    """
    command = [sys.executable, "-c", textwrap.dedent(code), tmp_path, change]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    found = artifact.load(tmp_path)
    if kept == "old":
        assert found.metadata == old.metadata
        assert found.tensors.keys() == old.tensors.keys()
    else:
        assert found.metadata == {"new": True}
        np.testing.assert_array_equal(found.tensors["a"], np.ones(3))
    artifact.save(tmp_path, {"b": np.zeros(2)}, {})
    assert list(artifact.load(tmp_path).tensors) == ["b"]
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "artifact.safetensors",
        "manifest.json",
    ]


def test_a_killed_save_that_is_saved_over_does_not_lose_the_finished_one(tmp_path, monkeypatch):
    """Two kills in a row: after the manifest, and in the next save before its own."""
    _saved(tmp_path)
    monkeypatch.setattr(artifact.os, "replace", _stop_at(tmp_path / "artifact.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        artifact.save(tmp_path, {"a": np.ones(3)}, {"number": 2})
    monkeypatch.undo()
    monkeypatch.setattr(artifact, "write_json", _stop_at(None))
    with pytest.raises(KeyboardInterrupt):
        artifact.save(tmp_path, {"a": np.zeros(3)}, {"number": 3})
    monkeypatch.undo()
    found = artifact.load(tmp_path)
    assert found.metadata == {"number": 2}
    np.testing.assert_array_equal(found.tensors["a"], np.ones(3))


def _stop_at(target, replace=os.replace):
    def stop(source, path):
        if target is None or path == target:
            raise KeyboardInterrupt
        replace(source, path)

    return stop
