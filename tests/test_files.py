import os
import socket
import subprocess
import sys

import pytest

from retex_jax import files


def leave(folder, name, process, host=None):
    """What a process leaves that is killed while it writes: its file, and what its writer has beside it."""
    path = folder / f".{name}.{host or socket.gethostname()}.{process}.tmp"
    path.mkdir()
    (path / name).write_text("half")
    (path / ".tmpaAj9vN").write_text("quarter")
    return path


def test_what_killed_processes_have_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = leave(tmp_path, "x.json", dead.pid)
    stays = [
        leave(tmp_path, "x.json", os.getppid()),  # at work
        leave(tmp_path, "x.json", dead.pid, "another"),  # nobody knows from here
        leave(tmp_path, "y.json", dead.pid),
        leave(tmp_path, "x.json.x", dead.pid),
    ]
    with files.replacing(tmp_path / "x.json") as beside:
        beside.write_text("{}")
        assert not left.exists()
    assert {*tmp_path.iterdir()} == {*stays, tmp_path / "x.json"}


def test_what_a_writer_leaves_beside_its_file_is_removed(tmp_path):
    with files.replacing(tmp_path / "x.json") as beside:
        beside.write_text("{}")
        beside.with_name("more").write_text("half")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_json_is_read_without_trust(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, null, "ü"]}', "utf-8")
    assert files.read_json(path) == {"a": [1, None, "ü"]}
    for wrong in (b"", b"{", b"\xff\xfe\x00", b'{"a": 1, "a": 1}', b"[" * 10**5, b"1" * 5000):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"x\.json is damaged"):
            files.read_json(path)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        files.read_json(tmp_path / "none.json")


def test_huge_json_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse file, which takes no room
    with pytest.raises(ValueError, match=r"x\.json: 1099511627776 bytes, expected at most"):
        files.read_json(path)


def test_hashes_do_not_depend_on_the_order_of_keys(tmp_path):
    assert files.json_hash({"a": 1, "b": [2]}) == files.json_hash({"b": [2], "a": 1})
    assert files.json_hash({"a": 1}) != files.json_hash({"a": 2})
    (tmp_path / "x").write_bytes(b"abc")
    assert files.file_hash(tmp_path / "x").startswith("ba7816bf8f01cfea")
