"""LoRA experts: a PEFT adapter folder read as the leaves of a fine-tuned model.

LoRA (arXiv:2106.09685) fine-tunes W to W + scaling * B A with A [r, in] and B [out, r]. The sum is
taken when a leaf is read, in float32 or the leaf's wider dtype, and cast to the leaf's dtype, so that
never more than one leaf is in memory. PEFT merges in the dtype of the weights.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.lora.config import LoraConfig, read_config
from retex_jax.snapshot import pickle_refusal
from retex_jax.sources import SafetensorsSource, Source
from retex_jax.typing import Array

TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model/model/"

# Looking for the nearest name is slow where an adapter is another model's, and no key fits.
_MAX_SUGGESTIONS = 10

# Of a module's name and a tensor's: which factor it is.
_FACTOR = re.compile(r"^(.+)/lora_(?:(A|B)/weight|embedding_(A|B))$")


@dataclass(frozen=True)
class _Update:
    """scaling * B A of one leaf; `swapped`: the leaf is stored as (in, out), as embeddings are."""

    a: str
    b: str
    scaling: float
    swapped: bool


@dataclass
class _Tensors:
    """An adapter's tensors by what they are; a value is the tensor's own name in the file."""

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    copies: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


class LoraSource:
    """A pretrained model plus one PEFT LoRA adapter; torch layout.

    Linear layers, `Conv1D` (fan_in_fan_out), embeddings and convolutions are added to; biases and
    `modules_to_save`, which the adapter holds in full, take the leaf's place.

    Attributes:
      path: the adapter's folder.
      base_model: what the adapter says that its base model is; not checked.
      leaves: the pretrained model's.
      extra: name to shape and dtype of what `modules_to_save` has and the pretrained model has not,
        such as a task's classifier; `read` reads these too.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        pretrained: Source,
        *,
        transposed: Sequence[str] | None = None,
    ):
        """Reads the adapter's configuration and headers.

        The keys' prefix and the leaves' may differ ("transformer.h.0" and "h/0"): one prefix is
        stripped from all keys or set before them, the one that most keys fit.

        Args:
          folder: with adapter_config.json and adapter_model.safetensors.
          pretrained: the base model, in torch layout: leaf "a/b/weight" for the key "a.b.weight".
          transposed: regular expressions of the leaves that are stored as (in, out), as GPT-2's
            Conv1D stores them. When not given, shapes tell, and fan_in_fan_out for square weights.

        Raises:
          ValueError: if a file is missing, malformed or pickled, or the adapter is no plain LoRA, has
            a key that fits no leaf, a factor without the other one, a wrong shape, or a square
            weight whose orientation is in doubt; all problems are listed.
        """
        if isinstance(transposed, str):
            raise ValueError(f"transposed: got {transposed!r}, expected a sequence of patterns")
        self.path = Path(folder)
        config, problems = read_config(self.path)
        self.base_model = config.base_model
        self.leaves = pretrained.leaves
        self.extra: dict[str, jax.ShapeDtypeStruct] = {}
        self._pretrained = pretrained
        self._adapter = _open(self.path)
        self._updates: dict[str, _Update] = {}
        self._copies: dict[str, str] = {}

        tensors = _sort_tensors(self._adapter.leaves)
        problems += [f"{name}: a tensor of no kind that can be read" for name in tensors.unknown]
        wanted = [f"{module}/weight" for module in tensors.factors] or list(tensors.copies)
        strip, add = _prefix_change(wanted, self.leaves, problems)

        def leaf_of(name: str) -> str:
            return add + name.removeprefix(strip)

        unmatched: dict[str, str] = {}
        linear = []
        for module, factors in tensors.factors.items():
            leaf = leaf_of(f"{module}/weight")
            if len(factors) < 2:
                problems.append(f"{module}: has lora_{min(factors)} and not the other factor")
            elif leaf not in self.leaves:
                unmatched[module] = leaf
            else:
                problems += self._add_update(module, leaf, tensors, config)
                if leaf in self._updates and module not in tensors.embeddings:
                    linear.append(leaf)
        problems += self._orient(linear, config.fan_in_fan_out, transposed)
        for name, tensor in tensors.copies.items():
            if leaf_of(name) in self.leaves:
                problems += self._add_copy(name, leaf_of(name), tensor)
            elif config.saves(name.rpartition("/")[0].replace("/", ".")):
                self.extra[name] = self._adapter.leaves[tensor]
                self._copies[name] = tensor
            else:
                unmatched[name] = leaf_of(name)
        for index, (name, leaf) in enumerate(unmatched.items()):
            nearest = tree.did_you_mean(leaf, self.leaves) if index < _MAX_SUGGESTIONS else ""
            problems.append(f"{name}: fits no leaf of the pretrained model{nearest}")
        if problems:
            raise ValueError(f"{self.path} can't be read:\n  " + "\n  ".join(problems))

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    def read(self, name: str) -> Array:
        """One leaf, or one of `extra`."""
        copy = self._copies.get(name)
        base = self._pretrained.read(name) if copy is None else self._adapter.read(copy)
        dtype = (self.leaves.get(name) or self.extra[name]).dtype
        update = self._updates.get(name)
        if update is None:
            return base if copy is None else np.asarray(base).astype(dtype, copy=False)
        wide = np.dtype(jnp.promote_types(np.float32, dtype))
        a, b = (self._adapter.read(key).astype(wide) for key in (update.a, update.b))
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[:2]) * wide.type(update.scaling)
        product = a.T @ b.T if update.swapped else b @ a
        total = product.reshape(base.shape)
        total += np.asarray(base)
        return total.astype(dtype, copy=False)

    def _add_update(
        self, module: str, leaf: str, tensors: _Tensors, config: LoraConfig
    ) -> list[str]:
        factors = tensors.factors[module]
        dotted, spec = module.replace("/", "."), self.leaves[leaf]
        a, b = (self._adapter.leaves[factors[side]].shape for side in "AB")
        rank, problem = config.rank(dotted), ""
        if not tree.is_float(spec.dtype):
            problem = f"the leaf has dtype {spec.dtype}, expected a float"
        elif len(a) != len(spec.shape) or len(b) != len(a) or len(a) < 2:
            problem = "the factors' axes do not fit"
        elif (a[0], b[1]) != (rank, rank):
            problem = f"the configuration says rank {rank}"
        elif module in tensors.embeddings or (len(a) == 2 and spec.shape == (a[1], b[0])):
            if spec.shape != (a[1], b[0]):
                problem = f"expected A [{rank}, entries] and B [features, {rank}]"
        elif (b[0], *a[1:]) != spec.shape or set(b[2:]) - {1}:
            problem = f"expected A [{rank}, inputs] and B [outputs, {rank}]"
        if problem:
            return [f"{module}: lora_A {a} and lora_B {b} for {leaf} {spec.shape}: {problem}"]
        swapped = spec.shape == (a[1], b[0])
        self._updates[leaf] = _Update(factors["A"], factors["B"], config.scaling(dotted), swapped)
        return []

    def _orient(
        self, leaves: Sequence[str], fan_in_fan_out: bool, transposed: Sequence[str] | None
    ) -> list[str]:
        """Settles which square weights are stored as (in, out), and checks what was declared."""
        problems, square = [], []
        told: dict[bool, str] = {}
        for leaf in leaves:
            shape, update = self.leaves[leaf].shape, self._updates[leaf]
            if len(shape) != 2:
                continue
            declared = None if transposed is None else tree.matches_any(transposed, leaf)
            if shape[0] == shape[1]:
                swapped = fan_in_fan_out if declared is None else declared
                square.append(leaf)
                self._updates[leaf] = replace(update, swapped=swapped)
            elif declared not in (None, update.swapped):
                problems.append(f"{leaf}: its shape {shape} is not what `transposed` says")
            else:
                told.setdefault(update.swapped, leaf)
        if transposed is None and square and (not fan_in_fan_out) in told:
            problems.append(
                f"{square} are square, fan_in_fan_out is {fan_in_fan_out}, but "
                f"{told[not fan_in_fan_out]} is stored the other way: say with `transposed` which "
                "leaves are stored as (in, out)"
            )
        return problems

    def _add_copy(self, name: str, leaf: str, tensor: str) -> list[str]:
        spec = self._adapter.leaves[tensor]
        expected = self.leaves[leaf]
        if spec.shape != expected.shape:
            return [f"{name}: has shape {spec.shape}, but {leaf} has {expected.shape}"]
        if spec.dtype != expected.dtype and not (
            tree.is_float(spec.dtype) and tree.is_float(expected.dtype)
        ):
            return [f"{name}: has dtype {spec.dtype}, but {leaf} has {expected.dtype}"]
        self._copies[leaf] = tensor
        return []


def _open(folder: Path) -> SafetensorsSource:
    path = folder / TENSORS_FILE
    if path.is_file():
        return SafetensorsSource(path)
    if (folder / PICKLE_FILE).is_file():
        raise ValueError(pickle_refusal([folder / PICKLE_FILE], TENSORS_FILE))
    raise ValueError(f"{folder}: has no {TENSORS_FILE}")


def _sort_tensors(names: Iterable[str]) -> _Tensors:
    """Tells factors from full copies.

    With bias="all", PEFT also writes the biases of modules to save under the names of its wrapper
    ("original_module", "modules_to_save"), beside the ones that it reads.
    """
    tensors, wrapped = _Tensors(), dict[tuple[str, str], str]()
    for name in names:
        key = name.removeprefix(PREFIX)
        match = _FACTOR.match(key)
        if not name.startswith(PREFIX):
            tensors.unknown.append(name)
        elif match:
            module, side, embedding_side = match.groups()
            factors = tensors.factors.setdefault(module, {})
            factors[side or embedding_side] = name
            if embedding_side:
                tensors.embeddings.add(module)
        elif re.search(r"(^|/)lora_", key):
            tensors.unknown.append(name)
        elif "/modules_to_save/" in key:
            module, rest = key.split("/modules_to_save/", 1)
            wrapped[module, rest.removeprefix("default/")] = name
        elif "/original_module/" not in key:
            tensors.copies[key.replace("/base_layer/", "/")] = name
    for (module, rest), name in wrapped.items():
        if not any(copy.startswith(f"{module}/") for copy in tensors.copies):
            tensors.copies[f"{module}/{rest}"] = name
    return tensors


def _prefix_change(
    names: Sequence[str], leaves: Mapping[str, object], problems: list[str]
) -> tuple[str, str]:
    """The prefix to strip and the prefix to add that lead most names to leaves."""
    changes: Counter[tuple[str, str]] = Counter()
    for name in names:
        parts = name.split("/")
        for start in range(len(parts) - 1):
            if "/".join(parts[start:]) in leaves:
                changes["".join(f"{part}/" for part in parts[:start]), ""] += 1
        changes.update(
            ("", leaf.removesuffix(name)) for leaf in leaves if leaf.endswith(f"/{name}")
        )
    unchanged = ("", "")
    best = [change for change, count in changes.items() if count == max(changes.values())]
    if unchanged in best or not best:
        return unchanged
    if len(best) > 1:
        found = [f"{add}{names[0].removeprefix(strip)}" for strip, add in sorted(best)]
        problems.append(f"{names[0]}: may be any of the leaves {found}")
    return best[0]
