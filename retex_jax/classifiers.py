"""Sequence classifiers on snapshots: their config.json, and adapters that bring a head of their own."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from retex_jax import lora
from retex_jax.convert.architectures import ARCHITECTURES

_LAST_WEIGHT = re.compile(r"(.*\.)?(classifier(\.out_proj)?|score)\.weight")


def adapter_config(hf_config: dict[str, Any], tensors: "AdapterTensors") -> dict[str, Any]:
    """The config of what an adapter makes: a classifier where it brings a head, else the same model."""
    heads = [spec for name, spec in tensors.extra.items() if _LAST_WEIGHT.fullmatch(name)]
    return classifier_config(hf_config, heads[0].shape[0]) if heads else hf_config


def classifier_config(hf_config: Mapping[str, Any], num_labels: int) -> dict[str, Any]:
    """The config.json of the sequence classifier on a model; it names no class where we know of none.

    Args:
      hf_config: of the model.
      num_labels: outputs of the classifier.
    """
    model_type = hf_config.get("model_type")
    names = [
        name
        for name, entry in ARCHITECTURES.items()
        if entry.model_type == model_type and name.endswith("ForSequenceClassification")
    ]
    config = {key: value for key, value in hf_config.items() if key != "id2label"}
    return {**config, "architectures": names, "num_labels": num_labels}


class AdapterTensors(Mapping[str, Any]):
    """A LoRA expert as torch tensors, each computed when it is read."""

    def __init__(self, source: lora.LoraSource):
        self._source = source
        self.extra = {name.replace("/", "."): spec for name, spec in source.extra.items()}
        self.specs = {name.replace("/", "."): spec for name, spec in source.leaves.items()}
        self.specs |= self.extra

    def __getitem__(self, name: str) -> Any:
        return np.asarray(self._source.read(name.replace(".", "/")))

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)
