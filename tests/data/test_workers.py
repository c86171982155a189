"""Images decoded by processes: as threads decode them, and what happens when one fails, dies or is in use."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import stand_ins

from retex_jax import data
from retex_jax.data import images as lazy_images
from retex_jax.data import published
from retex_jax.data.images import AUTOMATIC, Images
from retex_jax.data.workers import Workers

ROOT = Path(__file__).parents[2]
COUNT = 40


def open_folder(folder):
    """Opens a folder of images as a source."""
    return lambda i: Path(folder, f"{i}.png")


def open_grey(side):
    """Opens a source of grey squares, which is slow to read."""

    def read(i):
        time.sleep(0.05)
        return np.full((side, side), i, np.uint8)

    return read


def open_nothing():
    raise OSError("the source is gone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of several sizes."""
    made = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        pixels = stand_ins.pixels(0, i % 3, 5 + 3 * i, 40)
        (made / f"{i}.png").write_bytes(stand_ins.encoded(pixels))
    return made


@pytest.fixture(scope="module")
def workers():
    """Two processes, which `Images` of two workers use."""
    pool = lazy_images._processes(2)
    yield pool
    pool.close()
    lazy_images._processes.cache_clear()


def both(open_source, count=COUNT, image_size=16):
    """The same images by threads, and by two processes."""
    return (
        Images(
            open_source(),
            np.arange(count),
            image_size,
            "source",
            open_source=open_source,
            workers=number,
        )
        for number in (0, 2)
    )


def test_pixels_are_those_of_threads(workers, folder):
    for size in (16, 33, 8):
        by_threads, by_processes = both(partial(open_folder, folder), image_size=size)
        assert (by_threads.workers, by_processes.workers) == (0, 2)
        np.testing.assert_array_equal(by_processes.decode(), by_threads.decode())
    order = np.array([39, 3, 3, 17])
    np.testing.assert_array_equal(
        np.asarray(by_processes[order][1:]), np.asarray(by_threads)[order[1:]]
    )
    assert by_processes[:0].decode().shape == (0, 8, 8, 3)
    assert by_processes.check() == []


def test_several_sources_in_one_batch(workers, folder):
    pairs = [both(partial(open_folder, folder)), both(partial(open_grey, 20), count=9)]
    order = np.random.default_rng(0).permutation(COUNT + 9)
    joined = [Images.concatenate(kind)[order] for kind in zip(*pairs, strict=True)]
    assert [images.workers for images in joined] == [0, 2]
    np.testing.assert_array_equal(joined[1].decode(), joined[0].decode())
    mixed = Images.concatenate([joined[0], joined[1]])
    assert mixed.workers == 0


def test_batches_are_those_of_threads(workers, folder):
    by_threads, by_processes = both(partial(open_folder, folder))
    ours = data.padded_batches({"image": by_processes, "label": np.arange(COUNT)}, 16)
    theirs = data.padded_batches({"image": by_threads, "label": np.arange(COUNT)}, 16)
    for (a, valid_a), (b, valid_b) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(valid_a, valid_b)
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_threads_may_share_the_processes(workers, folder):
    by_threads, by_processes = both(partial(open_folder, folder))
    want, found = by_threads.decode(), {}

    def decode(k):
        found[k] = by_processes[k:].decode()

    threads = [threading.Thread(target=decode, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(6):
        np.testing.assert_array_equal(found[k], want[k:])


def test_broken_images_are_named_as_by_threads(workers, folder, tmp_path):
    for i in range(4):
        content = (folder / f"{i}.png").read_bytes()
        (tmp_path / f"{i}.png").write_bytes(content if i % 2 else content[:50])
    said = []
    for images in both(partial(open_folder, tmp_path), count=5):
        with pytest.raises(ValueError, match="3 that cannot be decoded") as caught:
            images.decode()
        said.append((str(caught.value), images.check()))
    assert said[0] == said[1]
    for i in (0, 2, 4):
        assert f"{tmp_path / f'{i}.png'}: " in said[1][0]


def test_source_that_cannot_be_opened_is_named(workers):
    images = Images(
        lambda i: b"", np.arange(3), 8, "elsewhere", open_source=open_nothing, workers=2
    )
    with pytest.raises(ValueError, match=r"elsewhere\[1\]: OSError: the source is gone"):
        images.decode()


def test_killed_process_is_an_error_and_replaced(workers, folder):
    _, slow = both(partial(open_grey, 20))
    before = workers.process_ids
    caught = []

    def decode():
        try:
            slow.decode()
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=decode)
    thread.start()
    time.sleep(0.1)
    os.kill(before[0], signal.SIGKILL)
    thread.join(30)
    assert not thread.is_alive()
    [said] = caught
    assert "ended by SIGKILL, between source[" in said and "data_sets.workers" in said
    assert len(workers.process_ids) == 2 and before[0] not in workers.process_ids
    by_threads, by_processes = both(partial(open_folder, folder))
    np.testing.assert_array_equal(by_processes.decode(), by_threads.decode())


def test_signals_of_the_group_are_left_to_the_caller(workers, folder):
    _, images = both(partial(open_folder, folder))
    before = workers.process_ids
    idle = [workers._idle.get() for _ in before]
    for worker in idle:  # each has begun its work
        assert worker.run({-1: (partial(open_folder, folder), "")}, [(-1, 0)], None) == [""]
        workers._idle.put(worker)
    for number in before:
        os.kill(number, signal.SIGINT)
        os.kill(number, signal.SIGTERM)
    images.decode()
    assert workers.process_ids == before


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
def test_memory_is_kept_unless_the_caller_says_otherwise(monkeypatch):
    def given():
        made = Workers(1)
        [pid] = made.process_ids
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        made.close()
        return dict(entry.partition("=")[::2] for entry in entries)

    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    assert int(given()["MALLOC_MMAP_THRESHOLD_"]) == 32 << 20
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000")
    assert given()["MALLOC_MMAP_THRESHOLD_"] == "1000"


def test_processes_end_when_closed():
    pool = Workers(2)
    running = [worker.process for worker in pool._all]
    pool.close()
    assert [process.returncode for process in running] == [0, 0]


def test_processes_end_with_the_program_and_import_no_jax(folder):
    """Also of a script without a guard, whose main module they do not run again."""
    (folder / "probe_source.py").write_text(
        "import sys\nimport numpy as np\n"
        "def open_probe():\n"
        "    return lambda i: np.full((8, 8), 'jax' in sys.modules, np.uint8)\n"
    )
    script = """
import os
import numpy as np
import probe_source
from retex_jax.data import images

opened = probe_source.open_probe
made = images.Images(opened(), np.arange(8), 8, "x", open_source=opened, workers=2)
print(made.decode().max(), *images._processes(2).process_ids, flush=True)
{}
"""
    for end in ("", "os.kill(os.getpid(), 9)"):
        done = subprocess.run(
            [sys.executable, "-c", script.format(end)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])},
        )
        assert done.returncode == (-9 if end else 0) and not done.stderr
        imports_jax, *numbers = map(int, done.stdout.split())
        assert imports_jax == 0 and len(numbers) == 2
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{number}").exists() for number in numbers):
            assert time.monotonic() < deadline
            time.sleep(0.05)


# Which are used


def test_processes_are_used_where_there_are_many_images(monkeypatch):
    def number(count, cores, **options):
        monkeypatch.setattr(lazy_images, "_num_cores", lambda: cores)
        source = {"open_source": partial(open_grey, 8), **options}
        return Images(lambda i: b"", np.arange(count), 8, "source", **source).workers

    assert AUTOMATIC == -1
    assert number(1999, 8) == 0
    assert number(2000, 8) == 8
    assert number(2000, 1) == 0
    assert number(2000, 500) == 64
    assert number(10, 8, workers=3) == 3
    assert number(2000, 8, workers=0) == 0
    assert number(2000, 8, open_source=None) == 0
    with pytest.raises(ValueError, match="workers=-2: expected -1"):
        number(10, 8, workers=-2)


LIMITS = {"max_train": None, "max_val": None, "max_test": None, "image_size": 8}


@pytest.mark.parametrize("source", ["folder", "array_record", "parquet"])
def test_every_source_travels(workers, tmp_path, source):
    classes = ("angular_leaf_spot", "bean_rust", "healthy")
    counts = {"train": 12, "validation": 3, "test": 5}
    if source == "array_record":
        stand_ins.write_tfds(tmp_path, "beans", classes, counts)
    elif source == "parquet":
        stand_ins.write_parquet(tmp_path / "beans", classes, counts)
    else:
        for seed, (split, count) in enumerate(counts.items()):
            stand_ins.write_folder(tmp_path / "beans" / split, classes, count, 1000 * seed)
    by_threads, by_processes = (
        published.load_published("beans", tmp_path, workers=number, **LIMITS) for number in (0, 2)
    )
    for split, arrays in by_threads.splits.items():
        ours = by_processes.splits[split]["image"]
        assert (arrays["image"].workers, ours.workers) == (0, 2)
        np.testing.assert_array_equal(ours.decode(), arrays["image"].decode())
