"""Offsets as LoRA adapters: G_t S of a matrix leaf is B A of a layer, with scaling 1.

The recovered expert (arXiv:2606.26902, Eq. 4) is then the merged model with a PEFT adapter on it. What
is no matrix is held in full: biases of adapted layers by bias="lora_only", norms by modules_to_save.
Nothing is rounded: factors are the state's, in float32.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retex_jax import files, tree
from retex_jax.lora.config import CONFIG_FILE
from retex_jax.lora.source import TENSORS_FILE
from retex_jax.typing import Array, FlatParams

if TYPE_CHECKING:
    from retex_jax.offsets.state import OffsetState

# Torch names don't tell an embedding, whose factors PEFT stores the other way round, from a layer.
EMBEDDINGS = (
    r"(^|/)(embed_tokens|embed_positions|wte|wpe)/weight$",
    r"(^|/)((word|token_type|position|token)_embeddings?)/weight$",
)


class Adapter(NamedTuple):
    """A PEFT adapter.

    Attributes:
      tensors: key ("base_model.model.<module>.lora_A.weight") to array.
      config: what adapter_config.json holds.
      left_out: leaves whose offsets the adapter can't hold.
    """

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    left_out: tuple[str, ...]


def adapter_from_offset(
    state: "OffsetState",
    task: int,
    *,
    torch_names: Mapping[str, str] | None = None,
    embeddings: Sequence[str] = EMBEDDINGS,
    transposed: Sequence[str] = (),
    base_model: str | None = None,
    task_type: str | None = None,
    partial: bool = False,
) -> Adapter:
    """Writes one task's offset as an adapter of the merged model.

    Leaves whose offset is zero are left as they are. A module is adapted if its leaf is called "weight"
    in torch and has 2 to 4 axes; modules with nothing but a 1-D "weight" or "bias" (norms) are saved in
    full. Where an embedding is also the output layer (tied), merge the adapter (PEFT's
    merge_and_unload): until then it acts on the inputs only.

    Args:
      state: from `offsets.fit`.
      task: task id, 0 to T - 1.
      torch_names: leaf name to torch name ("h.0.mlp.c_fc.weight"); needed in the "flax" layout, for
        leaves whose torch weight is theirs as a matrix (out, in), or the same if 1-D. In the "torch"
        layout "a/b/weight" is "a.b.weight" when not given. Leaves not named can't be held.
      embeddings: regular expressions of the leaves that torch keeps in an `Embedding`; in the
        "flax" layout a leaf called "embedding" is one.
      transposed: regular expressions of the leaves that torch keeps as (in, out), as GPT-2's Conv1D
        does.
      base_model: what the configuration calls the base model.
      task_type: PEFT's ("SEQ_CLS", ...); decides the class that PEFT loads it with.
      partial: whether to leave out what can't be held, rather than to raise.

    Returns:
      The adapter; `left_out` is empty unless `partial`.

    Raises:
      ValueError: if `task` is no integer or out of range, a torch name is used twice or `torch_names` is missing or
        names leaves that are not there; if an adapter can't hold an offset (all such leaves are
        listed) and `partial` is False; or if all offsets are zero or left out.
    """
    if not 0 <= tree.as_integer("task", task) < state.num_tasks:
        raise ValueError(f"task: got {task}, expected 0 to {state.num_tasks - 1}")
    for option, patterns in (("embeddings", embeddings), ("transposed", transposed)):
        if isinstance(patterns, str):
            raise ValueError(f"{option}: got {patterns!r}, expected a sequence of patterns")
    merged = tree.flatten(state.merged)
    names = _torch_names(state, merged, torch_names)
    modules: dict[str, dict[str, str]] = {}
    for leaf, torch_name in names.items():
        module, _, parameter = torch_name.rpartition(".")
        modules.setdefault(module, {})[parameter] = leaf

    lora, saved, left_out = _sort_leaves(state, merged, names, modules, task)
    if left_out and not partial:
        raise ValueError(
            f"task {task}: an adapter can't hold the offsets of {sorted(left_out)}; pass "
            "partial=True to leave them out"
        )
    if not lora:
        raise ValueError(f"task {task}: no matrix has an offset that an adapter can hold")

    tensors, ranks, fan_in_fan_out = {}, {}, False
    for module in sorted(lora):
        leaf = modules[module]["weight"]
        is_embedding = _is_embedding(leaf, state.layout, embeddings)
        is_transposed = not is_embedding and tree.matches_any(transposed, leaf)
        is_swapped = is_embedding or (is_transposed and state.layout == "torch")
        a, b = _factors(state, leaf, merged[leaf].shape, task, is_swapped)
        ranks[module] = a.shape[0]
        fan_in_fan_out |= is_transposed
        for side, factor in (("A", a), ("B", b)):
            kind = f"lora_embedding_{side}" if is_embedding else f"lora_{side}.weight"
            tensors[f"base_model.model.{module}.{kind}"] = factor
        if "bias" in modules[module]:
            bias = modules[module]["bias"]
            tensors[f"base_model.model.{module}.base_layer.bias"] = _recovered(
                state, bias, merged[bias], task
            )
    for module in sorted(saved):
        for parameter, leaf in modules[module].items():
            tensors[f"base_model.model.{module}.{parameter}"] = _recovered(
                state, leaf, merged[leaf], task
            )
    has_bias = any(key.endswith(".base_layer.bias") for key in tensors)
    config = _config(ranks, sorted(saved), "lora_only" if has_bias else "none", fan_in_fan_out)
    config |= {"base_model_name_or_path": base_model, "task_type": task_type}
    return Adapter(tensors, config, tuple(sorted(left_out)))


def save_adapter(
    folder: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> None:
    """Writes an adapter's two files, each beside its place and renamed; the configuration comes last.

    Args:
      folder: created if missing.
      tensors: of `adapter_from_offset`.
      config: of `adapter_from_offset`.

    Raises:
      ValueError: if there are no tensors, or the configuration is not made of JSON's types.
    """
    if not tensors:
        raise ValueError("tensors: got none, expected at least one")
    try:
        text = json.dumps(dict(config), indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: expected finite JSON values: {error}") from error
    arrays = {key: np.ascontiguousarray(array) for key, array in sorted(tensors.items())}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(folder / TENSORS_FILE, arrays, {"format": "pt"})
    with files.replacing(folder / CONFIG_FILE) as beside:
        beside.write_text(text)


def _torch_names(
    state: "OffsetState", merged: FlatParams, given: Mapping[str, str] | None
) -> dict[str, str]:
    if given is None:
        if state.layout == "flax":
            raise ValueError("torch_names: got none, but the state's leaves have Flax's names")
        return {leaf: leaf.replace("/", ".") for leaf in merged}
    unknown = sorted(given.keys() - merged.keys())
    twice = sorted(name for name, count in Counter(given.values()).items() if count > 1)
    if unknown or twice:
        raise ValueError(f"torch_names: {unknown} are no leaves; {twice} are used twice")
    return dict(given)


def _sort_leaves(
    state: "OffsetState",
    merged: FlatParams,
    names: Mapping[str, str],
    modules: Mapping[str, Mapping[str, str]],
    task: int,
) -> tuple[set[str], set[str], list[str]]:
    """The modules to adapt, the modules to save in full, and the changed leaves that fit neither."""
    lora: set[str] = set()
    saved: set[str] = set()
    left_out = []
    changed = {leaf for leaf in state.offsets if _offset(state, leaf, task).any()}
    for leaf in sorted(changed):
        module, _, parameter = names.get(leaf, "").rpartition(".")
        weight = modules.get(module, {}).get("weight")
        ndim = 0 if weight is None else merged[weight].ndim
        is_named = parameter == "weight" or (parameter == "bias" and merged[leaf].ndim == 1)
        if not module or ndim == 0 or not is_named:
            left_out.append(leaf)
        elif ndim > 1 and (merged[leaf].ndim == 1 or state.factors(leaf, task) is not None):
            lora.add(module)
        elif max(merged[other].ndim for other in modules[module].values()) == 1:
            saved.add(module)
        else:
            left_out.append(leaf)
    # PEFT saves every module whose name ends like one of these, so each must be one of them.
    everything = {
        ".".join(module.split(".")[:end])
        for module in modules
        for end in range(1, module.count(".") + 2)
    }
    while wrong := {
        module for module in saved if any(name.endswith(module) for name in everything - saved)
    }:
        saved -= wrong
        left_out += [
            leaf for module in wrong for leaf in modules[module].values() if leaf in changed
        ]
    return lora, saved, left_out


def _is_embedding(leaf: str, layout: str, embeddings: Sequence[str]) -> bool:
    if layout == "flax":
        return leaf.rpartition("/")[2] == "embedding"
    return tree.matches_any(embeddings, leaf)


def _offset(state: "OffsetState", leaf: str, task: int) -> np.ndarray:
    """[a, b], or [*shape] below two axes."""
    return np.asarray(state.form(leaf).offset(state.task_embeddings[task]))


def _factors(
    state: "OffsetState", leaf: str, shape: tuple[int, ...], task: int, is_swapped: bool
) -> tuple[np.ndarray, np.ndarray]:
    """lora_A and lora_B, as PEFT stores them for this kind of layer."""
    factors = state.factors(leaf, task)
    assert factors is not None  # leaves without are left out
    b, a = map(np.asarray, factors)
    b, a = b[:, b.any(axis=0)], a[b.any(axis=0)]
    if is_swapped:
        a, b = b.T, a.T
    view, ndim = tree.matrix_view(leaf, shape, state.layout), len(shape)
    # Convolutions; in Flax, where a kernel ends with (c_in, c_out), 3 axes may also be attention's.
    if view and ndim > 2 and (state.layout == "torch" or view.input_axes[0] == ndim - 2):
        a = a.reshape(-1, *(shape[axis] for axis in view.input_axes))
        b = b.reshape(*b.shape, *[1] * (ndim - 2))
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)


def _recovered(state: "OffsetState", leaf: str, merged: Array, task: int) -> np.ndarray:
    """A leaf below two axes plus its offset, summed in float32, in its own dtype."""
    value = np.asarray(merged)
    if leaf not in state.offsets:
        return value
    return (value.astype(np.float32) + _offset(state, leaf, task)).astype(value.dtype)


def _config(
    ranks: Mapping[str, int], saved: Sequence[str], bias: str, fan_in_fan_out: bool
) -> dict[str, Any]:
    """The configuration; alpha equals the rank, so that the scaling is 1."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(module): value for module, value in ranks.items() if value != rank}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "modules_to_save": list(saved) or None,
        "bias": bias,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
