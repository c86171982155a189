"""Images a second of the input pipeline beside those of the model that it feeds.

    python experiments/benchmarks/pipeline.py

JPEG files of 500 x 375 pixels, as photographs have, and PNG files of 32 x 32, are decoded, resized and cropped to 224
pixels by threads; CLIP ViT-B/32 with random weights reads them. "pipeline" decodes and does nothing else, "model" runs
on pixels in memory, and "together" is what an evaluation does: batches are decoded while the model runs. The
pipeline is no bottleneck where "together" is close to "model". On a CPU both need the same cores, so "together" cannot
exceed 1 / (1 / pipeline + 1 / model): "share" is how much of that it reaches. Writes
experiments/benchmarks/pipeline.json.
"""

import argparse
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import measuring
import numpy as np
from PIL import Image

from retex_jax import data, logging, models, recovery


def files(count: int, height: int, width: int, kind: str) -> list[bytes]:
    """Encoded images with coarse and fine structure."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth).astype(np.int16) + rng.integers(-12, 13, (height, width, 3))
        stream = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, kind)
        made.append(stream.getvalue())
    return made


def rate(count: int, run: Callable[[], object]) -> float:
    """Images a second of one run."""
    started = time.perf_counter()
    run()
    return count / (time.perf_counter() - started)


def measure(contents: list[bytes], batch_size: int, repeats: int) -> dict[str, float]:
    """Medians of images a second, the three in turn."""
    images = data.Images(contents.__getitem__, np.arange(len(contents)), 224, "files")
    pixels = images.decode()
    model = models.ViT(models.CLIP_B32)
    params = jax.device_put(models.init_params(model, jax.random.key(0)))

    def decode() -> None:
        for _ in data.padded_batches({"image": images}, batch_size):
            pass

    recovery.run(model, params, {"image": pixels[:batch_size]}, batch_size)  # compiles
    runs = [
        {
            "pipeline": rate(len(images), decode),
            "model": rate(
                len(images), lambda: recovery.run(model, params, {"image": pixels}, batch_size)
            ),
            "together": rate(
                len(images), lambda: recovery.run(model, params, {"image": images}, batch_size)
            ),
        }
        for _ in range(repeats)
    ]
    for run in runs:
        run["share"] = run["together"] * (1 / run["pipeline"] + 1 / run["model"])
    return measuring.medians(runs)


def main() -> None:
    """Measures both kinds of files, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    results = {"commit": logging.commit(), "device": logging.device(), "cores": os.cpu_count()}
    kinds = {"jpeg_500x375": (375, 500, "JPEG"), "png_32x32": (32, 32, "PNG")}
    for name, (height, width, kind) in kinds.items():
        contents = files(flags.images, height, width, kind)
        results[name] = measure(contents, flags.batch_size, flags.repeats)
        print(name, {key: round(value, 2) for key, value in results[name].items()})
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
