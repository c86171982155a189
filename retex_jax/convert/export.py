"""Writes one of our models as a Hugging Face snapshot: config.json and model.safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from retex_jax import files, tree
from retex_jax.convert.architectures import Architecture
from retex_jax.convert.engine import to_torch
from retex_jax.models import stacking
from retex_jax.snapshot import CONFIG, SINGLE


def export(
    folder: str | os.PathLike[str],
    model: nn.Module,
    params: Mapping,
    architecture: Architecture,
    hf_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a snapshot that transformers' class of the same name loads.

    Args:
      folder: where model.safetensors and config.json are written; files of these names are replaced,
        each at once.
      model: what the parameters belong to.
      params: nested dict; stacked blocks are written one by one.
      architecture: the class, such as `Loaded.architecture`.
      hf_config: config.json of the source, whose further keys (names of labels, ids of special
        tokens, ...) are kept.

    Raises:
      ValueError: as `to_torch`.
    """
    folder = Path(folder)
    if any("/blocks/" in f"/{name}" for name in tree.flatten(params)):
        params = stacking.unstack_blocks(params)
    tensors = to_torch(params, architecture.table(model))
    config = _merged_config(hf_config or {}, architecture.to_hf(model))
    config |= {"architectures": [architecture.name]}
    config.pop("torch_dtype", None)
    config["dtype"] = jnp.result_type(*(x.dtype for x in tensors.values())).name
    folder.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(folder / SINGLE, tensors, {"format": "pt"})
    with files.replacing(folder / CONFIG) as beside:
        beside.write_text(json.dumps(config, indent=2) + "\n")


def _merged_config(source: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(source)
    for key, value in ours.items():
        if key in ("vision_config", "text_config"):
            merged.pop(f"{key}_dict", None)
            old = {**(source.get(key) or {}), **(source.get(f"{key}_dict") or {})}
            merged[key] = {**old, **value}
        elif key in ("id2label", "label2id") and len(source.get(key) or ()) == len(value):
            pass  # the source's names of as many labels
        else:
            merged[key] = value
    return merged
