"""Forward passes of our models against transformers' torch models, side by side on the same cores.

    python experiments/benchmarks/forward.py

Random weights of the published shapes, float32; CLIP ViT-B/32 on 32 images and RoBERTa-base on 32 texts of 128 tokens.
The two run in turn, so that a drift of the machine's speed hits both; a ratio above 1 means that ours is faster. Needs
the extra `test` (torch, transformers). Writes experiments/benchmarks/forward.json.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from retex_jax import logging, models

Run = Callable[[], object]


def clip_b32(batch_size: int) -> tuple[Run, Run]:
    """Image embeddings of CLIP ViT-B/32: ours, and torch's."""
    pixels = np.random.default_rng(0).normal(size=(batch_size, 224, 224, 3)).astype(np.float32)
    config = transformers.CLIPVisionConfig(patch_size=32, projection_dim=512)
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return ours(models.ViT(models.CLIP_B32), {"image": pixels}), torch_run(
        theirs, {"pixel_values": images}
    )


def roberta_base(batch_size: int, length: int = 128) -> tuple[Run, Run]:
    """Hidden states of RoBERTa-base on texts without padding: ours, and torch's."""
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    )
    theirs = transformers.RobertaModel(config, add_pooling_layer=False).eval()
    ids = np.random.default_rng(0).integers(5, 50000, (batch_size, length)).astype(np.int32)
    mask = np.ones_like(ids)
    return ours(
        models.Bert(models.ROBERTA_BASE), {"input_ids": ids, "attention_mask": mask}
    ), torch_run(
        theirs,
        {
            "input_ids": torch.from_numpy(ids).long(),
            "attention_mask": torch.from_numpy(mask).long(),
        },
    )


def ours(model: object, batch: dict[str, np.ndarray]) -> Run:
    """A compiled forward pass of one of our models on parameters and inputs in place."""
    params = models.init_params(model, jax.random.key(0))
    batch = jax.device_put(batch)
    forward = jax.jit(lambda params, batch: model.apply({"params": params}, batch).pooled)
    return lambda: forward(params, batch).block_until_ready()


def torch_run(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Run:
    """An eager forward pass of a torch model."""

    def run() -> object:
        with torch.inference_mode():
            return model(**inputs)

    return run


def measure(pair: tuple[Run, Run], repeats: int) -> dict[str, float]:
    """Times two runs in turn, after one warm-up of each.

    Returns:
      Median seconds of each, and the median, least and largest ratio torch / ours of the pairs.
    """
    for run in pair:
        run()
    seconds = []
    for _ in range(repeats):
        marks = []
        for run in pair:
            started = time.perf_counter()
            run()
            marks.append(time.perf_counter() - started)
        seconds.append(marks)
    ratios = [theirs / own for own, theirs in seconds]
    return {
        "ours_seconds": statistics.median(own for own, _ in seconds),
        "torch_seconds": statistics.median(theirs for _, theirs in seconds),
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "largest_ratio": max(ratios),
    }


def main() -> None:
    """Measures both models and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    results = {"commit": logging.commit(), "device": logging.device(), "cores": os.cpu_count()}
    results["versions"] = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name, make in (("clip_vit_b32", clip_b32), ("roberta_base", roberta_base)):
        results[name] = measure(make(args.batch_size), args.repeats)
        print(name, {key: round(value, 3) for key, value in results[name].items()})
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
