"""Tests of finding snapshots, with a made-up huggingface_hub and with the real one on loopback."""

import http.server
import json
import os
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from retex_jax.convert import hub

TENSORS = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float16)}


def write_single(folder):
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(TENSORS, folder / "model.safetensors")
    return folder


def write_shards(folder):
    folder.mkdir(parents=True)
    for name, x in TENSORS.items():
        safetensors.numpy.save_file({name: x}, folder / f"model-{name}.safetensors")
    weight_map = {name: f"model-{name}.safetensors" for name in TENSORS}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


class FakeHub(types.ModuleType):
    """A huggingface_hub with one cached and one remote folder, either of which may be None."""

    def __init__(self, cached=None, remote=None):
        super().__init__("huggingface_hub")
        self.cached, self.remote, self.calls = cached, remote, []

    def snapshot_download(self, name, local_files_only=False, **arguments):
        self.calls.append((name, local_files_only, arguments))
        folder = self.cached if local_files_only else self.remote
        if folder is None:
            raise FileNotFoundError("not cached" if local_files_only else "no route to host")
        return str(folder)


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def test_local_folders_need_no_hub(tmp_path, no_hub):
    single = write_single(tmp_path / "root" / "owner" / "one")
    shards = write_shards(tmp_path / "root" / "two")
    assert hub.find(single) == hub.find(str(single)) == single
    assert hub.find("owner/one", root=tmp_path / "root") == single
    assert hub.find("owner/two", root=str(tmp_path / "root")) == shards
    empty = tmp_path / "empty"
    empty.mkdir()
    assert hub.find(empty) == empty  # opening it says what is wrong


def test_local_wins_over_cache_and_network(tmp_path, monkeypatch):
    local = write_single(tmp_path / "root" / "owner" / "name")
    fake = FakeHub(write_single(tmp_path / "cached"), write_single(tmp_path / "remote"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert hub.find("owner/name", root=tmp_path / "root") == local
    assert fake.calls == []
    assert hub.find("owner/name") == tmp_path / "cached"
    assert [call[1] for call in fake.calls] == [True]


def test_the_network_is_the_last_resort_and_pinned(tmp_path, monkeypatch):
    fake = FakeHub(remote=write_shards(tmp_path / "remote"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert hub.find("owner/name", tmp_path, revision="abc") == tmp_path / "remote"
    assert [(name, local) for name, local, _ in fake.calls] == [
        ("owner/name", True),
        ("owner/name", False),
    ]
    for _, _, arguments in fake.calls:
        assert arguments["revision"] == "abc"
        patterns = arguments["allow_patterns"]
        assert {"config.json", "model*.safetensors", "tokenizer*"} <= set(patterns)
        assert not any(
            pattern.endswith((".bin", ".pt", "*"))
            for pattern in set(patterns) - {"tokenizer*", "vocab.*"}
        )


def test_an_incomplete_cache_or_folder_is_passed_over(tmp_path, monkeypatch):
    cached = write_shards(tmp_path / "cached")
    (cached / "model-b.safetensors").unlink()
    (tmp_path / "root" / "name").mkdir(parents=True)
    fake = FakeHub(cached, write_single(tmp_path / "remote"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert hub.find("owner/name", root=tmp_path / "root") == tmp_path / "remote"
    with pytest.raises(FileNotFoundError, match="hf download owner/name"):
        hub.find("owner/name", root=tmp_path / "root", offline=True)
    fake.remote = tmp_path / "root" / "name"
    with pytest.raises(FileNotFoundError, match=r"revision main holds neither model\.safetensors"):
        hub.find("owner/name")


def test_what_to_do_is_said_where_nothing_is_found(tmp_path, monkeypatch):
    fake = FakeHub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    root = tmp_path / "my root"
    command = f"hf download owner/name --revision abc --local-dir '{root / 'owner/name'}'"
    with pytest.raises(FileNotFoundError) as error:
        hub.find("owner/name", root, revision="abc")
    assert command in str(error.value) and "no route to host" in str(error.value)
    fake.calls.clear()
    with pytest.raises(FileNotFoundError) as error:
        hub.find("owner/name", root, revision="abc", offline=True)
    assert command in str(error.value) and [call[1] for call in fake.calls] == [True]


def test_the_hub_is_missing(no_hub, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"hf download o/n --local(?s:.*)retex_jax\[hub\]"):
        hub.find("o/n", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"retex_jax\[hub\]"):
        hub.header("o/n")


def test_folder_of_a_repository_that_holds_several_models(tmp_path, monkeypatch):
    fake = FakeHub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    root = tmp_path / "root"
    with pytest.raises(FileNotFoundError) as error:
        hub.find("owner/name/cola/lr1", root)
    command = f"hf download owner/name --include 'cola/lr1/*' --local-dir {root}/owner/name"
    assert command in str(error.value)
    name, _, arguments = fake.calls[0]
    assert name == "owner/name" and "cola/lr1/config.json" in arguments["allow_patterns"]
    assert all(pattern.startswith("cola/lr1/") for pattern in arguments["allow_patterns"])
    fake.remote = tmp_path / "remote"
    write_single(tmp_path / "remote/cola/lr1")
    assert hub.find("owner/name/cola/lr1", root) == tmp_path / "remote/cola/lr1"
    beside = write_single(root / "name/cola/lr1")
    assert hub.find("owner/name/cola/lr1", root) == beside
    local = write_single(root / "owner/name/cola/lr1")
    assert hub.find("owner/name/cola/lr1", root) == local


def test_pickles_are_to_be_written_anew(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub())
    folder = tmp_path / "owner/name"
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        hub.find("owner/name", tmp_path, offline=True)


@pytest.mark.parametrize(
    "name", ["", "a//c", "a/b/../c", "../a", "a/..", "/absent", "a b", "--help", "a/.b", "a/b/"]
)
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="expected a folder or OWNER/NAME"):
        hub.find(name if name else "\n")
    with pytest.raises(ValueError, match="expected a folder or OWNER/NAME"):
        hub.header(name)
    with pytest.raises(ValueError, match="expected a folder or OWNER/NAME"):
        hub.header("a/b/c")


class Info(types.SimpleNamespace):
    """Attributes by name."""


def remote(files, weight_map):
    content = {
        file: Info(tensors={name: Info(**fields) for name, fields in tensors.items()})
        for file, tensors in files.items()
    }
    return Info(files_metadata=content, weight_map=weight_map)


A = {"dtype": "BF16", "shape": [2, 3], "data_offsets": (0, 12)}


def fake_header(monkeypatch, tmp_path, files, weight_map, config):
    fake = FakeHub()
    fake.get_safetensors_metadata = lambda name, revision: remote(files, weight_map)
    fake.file_exists = lambda name, file, revision: config is not None
    (tmp_path / "config.json").write_text(config or "")
    fake.hf_hub_download = lambda name, file, revision: str(tmp_path / file)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)


def test_header(monkeypatch, tmp_path):
    fake_header(monkeypatch, tmp_path, {"x": {"a": A}}, {"a": "x"}, '{"model_type": "bert"}')
    got = hub.header("owner/name")
    assert got.config == {"model_type": "bert"}
    assert got.specs == {"a": jax.ShapeDtypeStruct((2, 3), "bfloat16")}
    fake_header(monkeypatch, tmp_path, {"x": {"a": A}}, {"a": "x"}, None)
    assert hub.header("owner/name").config is None


def test_a_broken_header(monkeypatch, tmp_path):
    files = {"x": {"a": A, "b": {**A, "shape": [2**70]}}}
    fake_header(monkeypatch, tmp_path, files, {"a": "y", "c": "x"}, "[]")
    with pytest.raises(ValueError) as error:
        hub.header("owner/name")
    text = str(error.value)
    assert "4 problem(s)" in text and "x: b: shape [1180591620717411303424] is larger" in text
    assert "x: holds a, which the index does not" in text and "x: lacks c" in text
    assert "config.json: expected a JSON object, got list" in text


def test_no_network(monkeypatch):
    fake = FakeHub()

    def fail(name, revision):
        raise ConnectionError("no route to host")

    fake.get_safetensors_metadata = fail
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    with pytest.raises(FileNotFoundError, match=r"no header of revision abc.*no route to host"):
        hub.header("owner/name", "abc")


CHILD = """
import json, sys
from retex_jax.convert import hub
specs, config = hub.header("owner/name")
print(json.dumps([{name: [list(s.shape), str(s.dtype)] for name, s in specs.items()}, config]))
"""


def test_the_real_hub_reads_a_header_by_range(tmp_path):
    pytest.importorskip("huggingface_hub")
    big = {"big": np.zeros(1_000_000, np.float32), **TENSORS}
    files = {
        "model.safetensors": safetensors.numpy.save(big),
        "config.json": b'{"model_type": "bert"}',
    }
    sent = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, with_body):
            name = self.path.rsplit("/", 1)[-1]
            body = files.get(name) if "/resolve/main/" in self.path else None
            status = 404 if body is None else 200
            total = len(body or b"")
            body = body or b""
            wanted = self.headers.get("range", "")
            if wanted and status == 200:
                first, last = wanted.removeprefix("bytes=").split("-")
                body, status = body[int(first) : int(last) + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"0"')
            self.send_header("X-Repo-Commit", "0" * 40)
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            elif status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if with_body:
                sent.append(len(body))
                self.wfile.write(body)

        def do_GET(self):
            self.answer(True)

        def do_HEAD(self):
            self.answer(False)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=60
    )
    server.shutdown()
    server.server_close()
    assert child.returncode == 0, child.stderr
    specs, config = json.loads(child.stdout)
    assert specs == {name: [list(x.shape), str(x.dtype)] for name, x in big.items()}
    assert config == {"model_type": "bert"}
    assert sum(sent) < 200_000
