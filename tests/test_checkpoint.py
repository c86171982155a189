import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from retex_jax import files
from retex_jax.checkpoint import Checkpointer


class _State(NamedTuple):
    params: dict
    count: jax.Array


def _tree(seed=0):
    rng = np.random.default_rng(seed)
    return _State(
        params={
            "dense": {
                "kernel": jnp.asarray(rng.normal(size=(7, 5)), jnp.float32),
                "bias": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
            },
            "codes": jnp.asarray(rng.integers(0, 256, (3, 4)), jnp.uint8),
            "host": rng.normal(size=(2, 3)),  # float64, NumPy
            "mask": np.array([True, False]),
            "none": jnp.zeros((0, 4)),
            "list": [jnp.arange(3), np.float32(1.5), 7],
        },
        count=jnp.asarray(seed + 3, jnp.int32),
    )


def _assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for have, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(have) is type(want)
        assert np.asarray(have).dtype == np.asarray(want).dtype
        assert np.shape(have) == np.shape(want)
        assert np.asarray(have).tobytes() == np.asarray(want).tobytes()


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flip(path, position=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


def test_round_trip_keeps_values_dtypes_and_kinds(tmp_path):
    tree = _tree()
    checkpointer = Checkpointer(tmp_path / "new" / "folder")
    checkpointer.save(4, tree, {"config": {"rank": 8}, "note": "ü"})
    _assert_same(checkpointer.restore(4, tree), tree)
    assert checkpointer.metadata(4) == {"config": {"rank": 8}, "note": "ü"}
    assert checkpointer.latest() == 4


def test_round_trip_of_typed_keys(tmp_path):
    tree = {"key": jax.random.key(3), "many": jax.random.split(jax.random.key(4, impl="rbg"), 2)}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(0, tree)
    for like in (tree, jax.eval_shape(lambda: tree)):
        found = checkpointer.restore(0, like)
        for name, key in tree.items():
            assert found[name].dtype == key.dtype
            assert jnp.array_equal(jax.random.key_data(found[name]), jax.random.key_data(key))
    with pytest.raises(ValueError, match=r"leaf 'key': the checkpoint has key<fry>\[\], expected"):
        checkpointer.restore(0, {**tree, "key": jax.random.key(3, impl="rbg")})


def test_restore_into_shape_dtype_structs(tmp_path):
    tree = {"a": jnp.arange(6.0).reshape(2, 3)}
    Checkpointer(tmp_path).save(1, tree)
    sharding = SingleDeviceSharding(jax.devices()[0])
    for like in (
        jax.ShapeDtypeStruct((2, 3), jnp.float32),
        jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=sharding),
    ):
        found = Checkpointer(tmp_path).restore(1, {"a": like})["a"]
        assert isinstance(found, jax.Array) and found.sharding == sharding
        np.testing.assert_array_equal(found, tree["a"])


def test_every_flipped_file_is_caught_and_names_its_leaf(tmp_path):
    tree = _tree()
    checkpointer = Checkpointer(tmp_path / "whole")
    folder = checkpointer.save(1, tree)
    names = json.loads((folder / "record.json").read_text())["leaves"]
    arrays = [p for p in _files(folder) if p.parent.name.replace(".", "/") in names]
    with_data = {path.parent.name for path in arrays if path.name != ".zarray"}
    assert len(with_data) == len(names) - 1 == 9  # a leaf without elements has no file
    for path in _files(folder):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "whole", copy)
        _flip(copy / path.relative_to(tmp_path / "whole"))
        with pytest.raises(ValueError, match="damaged") as error:
            Checkpointer(copy).restore(1, tree)
        if path in arrays:
            assert f"leaf {path.parent.name.replace('.', '/')!r}" in str(error.value)
        else:
            assert path.name in str(error.value)
        shutil.rmtree(copy)


def test_content_is_hashed_apart_from_the_files(tmp_path, monkeypatch):
    # A value that was wrong before it reached the disk: the files are as recorded.
    tree = {"a": {"b": jnp.arange(4.0)}, "c": jnp.ones(2)}
    checkpointer = Checkpointer(tmp_path)
    folder = checkpointer.save(1, tree)
    data = folder / "state" / "a.b" / "0"
    _flip(data)
    monkeypatch.setattr("retex_jax.checkpoint.records.damaged_files", lambda *_, **__: [])
    with pytest.raises(ValueError, match="'a/b'") as error:
        checkpointer.restore(1, tree)
    assert "'c'" not in str(error.value)


def test_truncated_and_deleted_files(tmp_path, caplog):
    tree = {"a": jnp.arange(100.0), "b": jnp.ones(3)}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, tree)
    folder = checkpointer.save(2, tree)
    data = folder / "state" / "a" / "0"
    size = data.stat().st_size
    os.truncate(data, size - 1)
    (folder / "state" / "b" / "0").unlink()
    with pytest.raises(ValueError, match=f"'a': .* has {size - 1} bytes, expected {size}") as error:
        checkpointer.restore(2, tree)
    assert "leaf 'b': file state/b/0 is missing" in str(error.value)
    assert checkpointer.latest() == 1
    assert "skipped checkpoint step 2" in caplog.text and "leaf 'a'" in caplog.text
    _assert_same(checkpointer.restore(1, tree), tree)


def test_missing_extra_shape_and_dtype_are_listed_together(tmp_path):
    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones(1), "d": jnp.zeros(2)}
    Checkpointer(tmp_path).save(1, tree)
    like = {
        "a": jax.ShapeDtypeStruct((3, 2), jnp.float32),
        "b": jax.ShapeDtypeStruct((4,), jnp.bfloat16),
        "e": jax.ShapeDtypeStruct((1,), jnp.float32),
        "d": jnp.zeros(2),
    }
    with pytest.raises(ValueError, match="doesn't fit") as error:
        Checkpointer(tmp_path).restore(1, like)
    assert str(error.value).splitlines()[1:] == [
        "  leaf 'a': the checkpoint has float32[2, 3], expected float32[3, 2]",
        "  leaf 'b': the checkpoint has float32[4], expected bfloat16[4]",
        "  leaf 'c': not expected",
        "  leaf 'e': missing in the checkpoint, expected float32[1]",
    ]


def test_broken_steps_are_skipped_and_named(tmp_path, caplog):
    tree = {"a": jnp.ones(3)}
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest() is None
    checkpointer.save(3, tree)
    (tmp_path / "9").mkdir()
    checkpointer.save(4, tree)
    (tmp_path / "notes").mkdir()
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "record.json").write_text("{")
    (tmp_path / "8" / "state").mkdir(parents=True)
    caplog.clear()
    assert checkpointer.latest() == 4
    assert checkpointer.steps() == [3, 4]
    for text in ("step 9", "folder is empty", "step 8", "is missing", "step 7", "is damaged"):
        assert text in caplog.text
    with pytest.raises(ValueError, match="the folder is empty"):
        checkpointer.restore(9, tree)
    with pytest.raises(ValueError, match="no such checkpoint step"):
        checkpointer.metadata(5)
    checkpointer.save(9, tree)
    assert checkpointer.latest() == 9


def test_a_flipped_bit_in_the_newest_step_is_named_and_the_older_one_taken(tmp_path, caplog):
    tree = {"a": jnp.arange(100.0)}
    checkpointer = Checkpointer(tmp_path, max_to_keep=2)
    checkpointer.save(1, tree)
    _flip(checkpointer.save(4, tree) / "state" / "a" / "0")
    assert checkpointer.latest() == 1
    assert "skipped checkpoint step 4" in caplog.text and "'a': file state/a/0" in caplog.text
    with pytest.raises(ValueError, match="damaged"):
        checkpointer.restore(4, tree)
    checkpointer.save(2, tree)  # the run goes on from step 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    _assert_same(checkpointer.restore(2, tree), tree)


def test_a_step_under_another_name_is_not_whole(tmp_path, caplog):
    tree = {"a": jnp.ones(3)}
    Checkpointer(tmp_path).save(3, tree).rename(tmp_path / "5")
    assert Checkpointer(tmp_path).latest() is None
    assert "the record is of step 3" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("files"), "expected metadata, and what leaves and files are"),
        (lambda record: record["files"].update({"../x": [1, "y"]}), "expected metadata"),
        (lambda record: record["files"].update({"/etc/passwd": [1, "y"]}), "expected metadata"),
        (lambda record: record["leaves"].update(a=[]), "expected metadata"),
        (lambda record: record.pop("schema"), "schema is None"),
    ],
)
def test_hostile_records_are_refused(change, message, tmp_path):
    tree = {"a": jnp.ones(3)}
    path = Checkpointer(tmp_path).save(1, tree) / "record.json"
    record = json.loads(path.read_text())
    del record["sha256"]
    change(record)
    path.write_text(json.dumps({**record, "sha256": files.json_hash(record)}))
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path).restore(1, tree)
    assert Checkpointer(tmp_path).latest() is None


@pytest.mark.parametrize("name", ["a/.zarray", "_METADATA", "array_metadatas/process_0"])
def test_json_that_is_nested_deeply_does_not_reach_orbax(name, tmp_path):
    """Its parser would overflow the stack; a hostile author can write the hashes anew."""
    tree = {"a": jnp.ones(3)}
    folder = Checkpointer(tmp_path).save(1, tree)
    changed = folder / "state" / name
    changed.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    record = json.loads((folder / "record.json").read_text())
    del record["sha256"]
    record["files"][f"state/{name}"] = [changed.stat().st_size, files.file_hash(changed)]
    record["sha256"] = files.json_hash(record)
    (folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{changed.name} is damaged: JSON nested too deeply"):
        Checkpointer(tmp_path).restore(1, tree)


def test_record_is_checked(tmp_path):
    tree = {"a": jnp.ones(3)}
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(1, tree, {"rank": 4}) / "record.json"
    path.write_text(path.read_text().replace('"rank": 4', '"rank": 5'))
    with pytest.raises(ValueError, match="content hash"):
        checkpointer.metadata(1)
    assert checkpointer.latest() is None


def test_keeps_the_newest_and_replaces(tmp_path):
    checkpointer = Checkpointer(tmp_path, max_to_keep=2)
    (tmp_path / ".1.saving").mkdir()
    for step in (0, 1, 2):
        checkpointer.save(step, {"a": jnp.full(2, step)})
    checkpointer.save(2, {"a": jnp.full(2, 9)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert checkpointer.restore(2, {"a": jnp.zeros(2, int)})["a"].tolist() == [9, 9]
    with pytest.raises(ValueError, match="step: got 1, expected at least 2"):
        checkpointer.save(1, {"a": jnp.ones(2)})


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"a": jnp.ones(2)})

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("retex_jax.checkpoint.records.write", full)
    with pytest.raises(OSError, match="no space"):
        checkpointer.save(2, {"a": jnp.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("step", "tree", "metadata", "message"),
    [
        (-1, {"a": np.ones(2)}, {}, "step: got -1"),
        (1, {}, {}, "no leaves"),
        (1, {"a": {"b": np.ones(2)}, "a/b": np.ones(2)}, {}, "'a/b' and 'a/b' have one name"),
        (1, {"a": {"b": np.ones(2)}, "a.b": np.ones(2)}, {}, "have one name on disk"),
        (1, {"a": "text"}, {}, "leaf 'a' is a str"),
        (1, {"a": np.array([None])}, {}, "leaf 'a' is a ndarray of dtype object"),
        (1, {"a": np.ones(2)}, {"loss": float("nan")}, "metadata"),
        (1, {"a": np.ones(2)}, {"path": object()}, "metadata"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, step, tree, metadata, message):
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path / "new").save(step, tree, metadata)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="max_to_keep: got 0"):
        Checkpointer(tmp_path, max_to_keep=0)


_KILLED = """
    import os, signal, sys
    import numpy as np
    from retex_jax.checkpoint import Checkpointer, checkpointer, records
    directory, moment = sys.argv[1:]
    saver = Checkpointer(directory, max_to_keep=1)
    saver.save(1, {"a": np.full(1000, 1.0)}, {"step": 1})
    die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    if moment == "arrays":
        checkpointer.ocp.Checkpointer.save = die
    elif moment == "record":
        records.write = die
    elif moment == "rename":
        checkpointer.os.replace = die
    elif moment == "removal":
        checkpointer.shutil.rmtree = die
    saver.save(2, {"a": np.full(1000, 2.0)}, {"step": 2})
"""


@pytest.mark.parametrize(
    ("moment", "expected"), [("arrays", 1), ("record", 1), ("rename", 1), ("removal", 2)]
)
def test_kill_during_save_leaves_a_whole_step(tmp_path, moment, expected):
    code = textwrap.dedent(_KILLED)
    done = subprocess.run([sys.executable, "-c", code, tmp_path, moment], check=False)
    assert done.returncode == -signal.SIGKILL
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest() == expected
    assert checkpointer.metadata(expected) == {"step": expected}
    found = checkpointer.restore(expected, {"a": np.zeros(1000)})["a"]
    np.testing.assert_array_equal(found, np.full(1000, float(expected)))
    checkpointer.save(3, {"a": np.zeros(1000)})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


_TWO_PROCESSES = """
    import sys
    port, index, directory = sys.argv[1:]
    import jax, numpy as np
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from retex_jax.checkpoint import Checkpointer
    mesh = Mesh(np.array(jax.devices()), ("data",))
    whole = np.arange(8, dtype=np.float32).reshape(4, 2)
    place = lambda spec: jax.make_array_from_callback(
        (4, 2), NamedSharding(mesh, spec), lambda index: whole[index]
    )
    tree = {"split": place(PartitionSpec("data")), "copied": place(PartitionSpec())}
    saver = Checkpointer(directory)
    saver.save(5, tree, {"processes": 2})
    like = {"split": tree["copied"], "copied": tree["split"]}  # onto other shardings
    found = saver.restore(5, like)
    for name in like:
        assert found[name].sharding == like[name].sharding
        for shard in found[name].addressable_shards:
            assert np.array_equal(shard.data, whole[shard.index])
    print("ok", jax.process_count())
"""


def test_two_processes_save_and_restore_sharded(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    code = textwrap.dedent(_TWO_PROCESSES)
    command = [sys.executable, "-c", code, port]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        for run in runs:
            out, err = run.communicate(timeout=90)
            assert "ok 2" in out, err
    finally:
        for run in runs:
            run.kill()
    whole = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    found = Checkpointer(tmp_path).restore(5, {"split": whole, "copied": whole})
    np.testing.assert_array_equal(found["split"], whole)


def test_orbax_is_quiet_and_other_absl_warnings_pass(tmp_path):
    code = """
        import sys, numpy as np
        from absl import logging
        from retex_jax.checkpoint import Checkpointer
        saver = Checkpointer(sys.argv[1])
        saver.save(1, {"a": np.ones(3)})
        saver.restore(1, {"a": np.ones(3)})
        logging.warning("somebody else's")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.strip().splitlines() == ["WARNING:absl:somebody else's"]


def test_record_is_plain_json(tmp_path):
    record = json.loads((Checkpointer(tmp_path).save(1, _tree()) / "record.json").read_text())
    leaf = record["leaves"]["params/dense/bias"]
    assert (leaf["shape"], leaf["dtype"], len(leaf["sha256"])) == ([5], "bfloat16", 64)
