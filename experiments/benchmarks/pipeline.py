"""Images a second of the input pipeline beside those of the model that it feeds.

    python experiments/benchmarks/pipeline.py

JPEG files of 500 x 375 pixels, as photographs have, and PNG files of 32 x 32, are decoded, resized and cropped to 224
pixels; CLIP ViT-B/32 with random weights reads them. "threads" and "processes" decode and do nothing else, one a core;
"model" runs on pixels in memory, and "together" is what an evaluation does: batches are decoded by processes while the
model runs ("together_threads": by threads).

The goal is that the pipeline is never the bottleneck: "pipeline_to_model", of processes, is to be 1 or more. What a
faster device needs is "one_process" times its number of processes. On a CPU pipeline and model need the same cores, so
"together" cannot exceed 1 / (1 / processes + 1 / model): "share" is how much of that it reaches. What only decodes goes
over the files several times, as one time is too short to measure. Takes about three minutes on two cores; writes
experiments/benchmarks/pipeline.json.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import measuring
import numpy as np
from PIL import Image

from retex_jax import data, logging, models, recovery
from retex_jax.data import folders


def write_files(folder: Path, count: int, height: int, width: int, kind: str) -> None:
    """Writes FOLDER/images/NUMBER.KIND, with coarse and fine structure."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(count):
        coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth).astype(np.int16) + rng.integers(-12, 13, (height, width, 3))
        made = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        made.save(folder / f"images/{i:04}.{kind}")


def rate(count: int, run: Callable[[], object], passes: int = 1) -> float:
    """Images a second of a run that is repeated."""
    started = time.perf_counter()
    for _ in range(passes):
        run()
    return passes * count / (time.perf_counter() - started)


def measure(folder: Path, batch_size: int, repeats: int, passes: int) -> dict[str, float]:
    """Medians of images a second, all in turn."""
    open_source = folders.read_folder(folder).parts["all"].images()
    count = len(list(folder.rglob("*.*")))
    processes = os.cpu_count() or 1
    by_threads, by_one, by_processes = (
        data.Images(
            open_source(),
            np.arange(count),
            224,
            "files",
            open_source=open_source,
            workers=workers,
        )
        for workers in (0, 1, processes)
    )
    pixels = by_threads.decode()
    model = models.ViT(models.CLIP_B32)
    params = jax.device_put(models.init_params(model, jax.random.key(0)))

    def decode(images: data.Images) -> None:
        for _ in data.padded_batches({"image": images}, batch_size):
            pass

    def run(images: np.ndarray | data.Images) -> None:
        recovery.run(model, params, {"image": images}, batch_size)

    for images in (by_one, by_processes):  # starts the processes
        np.testing.assert_array_equal(images.decode(), pixels)
    run(pixels[:batch_size])  # compiles
    runs = [
        {
            "threads": rate(count, lambda: decode(by_threads), passes),
            "one_process": rate(count, lambda: decode(by_one), passes),
            "processes": rate(count, lambda: decode(by_processes), passes),
            "model": rate(count, lambda: run(pixels)),
            "together_threads": rate(count, lambda: run(by_threads)),
            "together": rate(count, lambda: run(by_processes)),
        }
        for _ in range(repeats)
    ]
    for figures in runs:
        figures["pipeline_to_model"] = figures["processes"] / figures["model"]
        slowness = 1 / figures["processes"] + 1 / figures["model"]
        figures["share"] = figures["together"] * slowness
    return measuring.medians(runs)


def main() -> None:
    """Measures both kinds of files, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--passes", type=int, default=4, help="over the files, of what only decodes"
    )
    flags = parser.parse_args()
    results = {
        "commit": logging.commit(),
        "device": logging.device(),
        "cores": os.cpu_count(),
        **vars(flags),
    }
    kinds = {"jpeg_500x375": (375, 500, "jpg"), "png_32x32": (32, 32, "png")}
    for name, (height, width, kind) in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), flags.images, height, width, kind)
            found = measure(Path(folder), flags.batch_size, flags.repeats, flags.passes)
        results[name] = found
        print(name, {key: round(value, 2) for key, value in found.items()})
        ratio = found["pipeline_to_model"]
        print(
            f"  pipeline / model: {ratio:.2f}; the goal, 1 or more, is {'' if ratio >= 1 else 'not '}met"
        )
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
