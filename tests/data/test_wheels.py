import hashlib
import subprocess
import zipfile
from types import SimpleNamespace

import pytest

from retex_jax.data import wheels
from retex_jax.data.wheels import Wheel, cache_dir, fetch, fetch_all, read_member


def build_wheel(folder, name="tiny-set", version="1.0", members=(("tiny/data/a.txt", b"abc"),)):
    """Writes a small wheel and returns the pin that fits it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members:
            archive.writestr(member, content)
    return Wheel(name, version, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def no_pip(monkeypatch):
    """Makes every start of a program fail the test."""

    def run(*args, **kwargs):
        raise AssertionError(f"started a program: {args}")

    monkeypatch.setattr(subprocess, "run", run)


def fake_pip(monkeypatch, action):
    """Replaces pip by action(destination folder), counting the calls."""
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        action(command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def failing(stderr):
    def action(folder):
        raise subprocess.CalledProcessError(1, "pip", stderr=stderr)

    return action


def test_cache_dir_follows_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RETEX_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("RETEX_CACHE")
    assert cache_dir().parts[-2:] == (".cache", "retex_jax")


def test_cached_wheel_needs_no_network(tmp_path, no_pip):
    wheel = build_wheel(tmp_path)
    assert fetch(wheel, tmp_path) == tmp_path / "tiny_set-1.0-py3-none-any.whl"
    assert read_member(wheel, "a.txt", tmp_path) == b"abc"


def test_wrong_hash_names_all(tmp_path, no_pip):
    wheel = build_wheel(tmp_path)
    wrong = Wheel(wheel.name, wheel.version, "0" * 64)
    with pytest.raises(ValueError) as caught:
        fetch(wrong, tmp_path)
    for part in ("tiny-set==1.0", "0" * 64, wheel.sha256, "tiny_set-1.0-py3-none-any.whl"):
        assert part in str(caught.value)


def test_changed_file_is_hashed_again(tmp_path, no_pip):
    wheel = build_wheel(tmp_path)
    path = fetch(wheel, tmp_path)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data + b"x")
    with pytest.raises(ValueError, match="SHA-256"):
        fetch(wheel, tmp_path)


def test_download_goes_into_cache_once(tmp_path, monkeypatch):
    wheel = build_wheel(tmp_path / "index")
    source = next((tmp_path / "index").iterdir())
    cache = tmp_path / "cache"

    def deliver(folder):
        assert str(folder).startswith(str(cache)), "the file must be moved within one file system"
        (type(source)(folder) / source.name).write_bytes(source.read_bytes())

    calls = fake_pip(monkeypatch, deliver)
    said = []
    assert fetch(wheel, cache, said.append) == cache / source.name
    assert fetch(wheel, cache, said.append) == cache / source.name
    assert len(calls) == 1 and len(said) == 1 and "tiny-set==1.0" in said[0]
    for word in ("--no-deps", "--only-binary=:all:", "tiny-set==1.0", "--timeout", "--retries"):
        assert word in calls[0]
    assert [p.name for p in cache.iterdir()] == [source.name], "temporary files must be gone"


def test_wrong_download_is_not_kept(tmp_path, monkeypatch):
    wheel = Wheel("tiny-set", "1.0", "0" * 64)
    name = "tiny_set-1.0-py3-none-any.whl"
    fake_pip(monkeypatch, lambda f: (tmp_path.__class__(f) / name).write_bytes(b"junk"))
    with pytest.raises(ValueError, match=hashlib.sha256(b"junk").hexdigest()):
        fetch(wheel, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_network(tmp_path, monkeypatch):
    fake_pip(monkeypatch, failing("ERROR: No matching distribution found"))
    with pytest.raises(RuntimeError) as caught:
        fetch(Wheel("tiny-set", "1.0", "0" * 64), tmp_path / "c")
    for part in ("tiny-set==1.0", str(tmp_path / "c"), "No matching distribution", "0" * 64):
        assert part in str(caught.value)
    assert list((tmp_path / "c").iterdir()) == []


def test_pip_missing(tmp_path, monkeypatch):
    fake_pip(monkeypatch, failing("/usr/bin/python: No module named pip"))
    with pytest.raises(RuntimeError, match=r"pip is missing.*ensurepip.*tiny-set==1\.0"):
        fetch(Wheel("tiny-set", "1.0", "0" * 64), tmp_path)


def test_fetch_all_names_everything_missing(tmp_path, monkeypatch):
    there = build_wheel(tmp_path, "there")
    pins = {n: Wheel(n, "2.0", "0" * 64) for n in ("first", "second", "third")}
    monkeypatch.setattr(wheels, "WHEELS", {"there": there, **pins})
    calls = fake_pip(monkeypatch, failing("no network"))
    with pytest.raises(RuntimeError) as caught:
        fetch_all(["there", "first", "second", "third", "first"], tmp_path)
    assert all(f"{name}==2.0" in str(caught.value) for name in pins)
    assert "there==1.0" not in str(caught.value)
    assert len(calls) == 1, "must give up after the first failure"


def test_fetch_all_names_every_wrong_hash(tmp_path, monkeypatch, no_pip):
    pins = {}
    for name in ("first", "second"):
        build_wheel(tmp_path, name)
        pins[name] = Wheel(name, "1.0", "0" * 64)
    monkeypatch.setattr(wheels, "WHEELS", pins)
    with pytest.raises(ValueError, match=r"(?s)first==1.0.*second==1.0"):
        fetch_all(["first", "second"], tmp_path)
    with pytest.raises(ValueError, match="fourth"):
        fetch_all(["fourth"], tmp_path)


def test_read_member_needs_exactly_one(tmp_path, no_pip):
    members = (("p/a/config.json", b"1"), ("p/b/config.json", b"2"), ("p/b/my_config.json", b"3"))
    wheel = build_wheel(tmp_path, members=members)
    assert read_member(wheel, "b/config.json", tmp_path) == b"2"
    with pytest.raises(ValueError, match="got 2"):
        read_member(wheel, "config.json", tmp_path)
    with pytest.raises(ValueError, match="got 0"):
        read_member(wheel, "absent.json", tmp_path)


def test_pins_are_well_formed():
    for name, wheel in wheels.WHEELS.items():
        assert wheel.name == name and len(wheel.sha256) == 64 and int(wheel.sha256, 16)
