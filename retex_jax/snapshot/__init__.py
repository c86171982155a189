"""Checkpoints as Hugging Face stores them, opened without trust: safetensors, shards and config.json."""

from retex_jax.snapshot.file import DTYPES, SafetensorsFile, parse_entry, parse_json
from retex_jax.snapshot.folder import (
    CONFIG,
    INDEX,
    SINGLE,
    Snapshot,
    pickle_refusal,
    read_weight_map,
)

__all__ = [
    "CONFIG",
    "DTYPES",
    "INDEX",
    "SINGLE",
    "SafetensorsFile",
    "Snapshot",
    "parse_entry",
    "parse_json",
    "pickle_refusal",
    "read_weight_map",
]
