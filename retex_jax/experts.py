"""One pretrained model and T experts of it, read leaf by leaf.

An `ExpertSet` is what every method fits on. It checks once, early and completely, that the experts
belong to the pretrained model, and then hands out one leaf of all experts at a time, so that a method
needs the memory of one leaf's stack, not of T models. The leaves come from trees in memory or from
safetensors files, which are read through memory maps.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from safetensors import SafetensorError, safe_open

from retex_jax import tree
from retex_jax.typing import Array, Layout, Params

_DTYPES = {
    "F64": jnp.float64,
    "F32": jnp.float32,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Source(Protocol):
    """Where the leaves of one model come from."""

    @property
    def leaves(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Leaf name to shape and dtype, without reading any data."""
        ...

    def read(self, name: str) -> Array:
        """One leaf."""
        ...


class TreeSource:
    """A nested dict of arrays in memory."""

    def __init__(self, params: Params):
        """Takes the tree as it is; no leaf is copied.

        Raises:
          ValueError: as `tree.flatten`, and for a leaf that is not an array or a number.
        """
        self._flat = tree.flatten(params)
        for name, leaf in self._flat.items():
            if type(leaf) in (bool, int, float):
                dtype = {bool: np.bool_, int: np.int32, float: np.float32}[type(leaf)]
                self._flat[name] = np.asarray(leaf, dtype)
            elif not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
                raise ValueError(f"{name}: got a {type(leaf).__name__}, expected an array")
            elif not (leaf.dtype == np.bool_ or _is_real(leaf.dtype)):
                raise ValueError(f"{name}: got dtype {leaf.dtype}, expected real numbers")
        self.leaves = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in self._flat.items()
        }

    def read(self, name: str) -> Array:
        """One leaf, as it was given."""
        return self._flat[name]


class SafetensorsSource:
    """A safetensors file, read through a memory map; names "a.b" become "a/b"."""

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the header only.

        Raises:
          ValueError: if the file is missing, truncated or malformed, or holds a dtype that no
            expert can have, or two names that differ only in "." and "/".
        """
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="np")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path}: not a whole, readable safetensors file: {error}"
            ) from error
        self._keys: dict[str, str] = {}
        self.leaves: dict[str, jax.ShapeDtypeStruct] = {}
        for key in sorted(self._file.keys()):
            name = key.replace(".", "/")
            header = self._file.get_slice(key)
            if header.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{self.path}: {key} has dtype {header.get_dtype()}, "
                    f"expected one of {sorted(_DTYPES)}"
                )
            if name in self._keys:
                raise ValueError(f"{self.path}: {key} and {self._keys[name]} name the same leaf")
            self._keys[name] = key
            self.leaves[name] = jax.ShapeDtypeStruct(
                tuple(header.get_shape()), _DTYPES[header.get_dtype()]
            )

    def read(self, name: str) -> np.ndarray:
        """One leaf, copied out of the memory map."""
        return self._file.get_tensor(self._keys[name])


def read_safetensors(path: str | os.PathLike[str], include: str = "") -> Params:
    """Reads the leaves whose name contains the regular expression `include`, as a nested dict.

    Raises:
      ValueError: as `SafetensorsSource`.
    """
    source = SafetensorsSource(path)
    return tree.unflatten(
        {name: source.read(name) for name in source.leaves if tree.matches_any([include], name)}
    )


@dataclass(frozen=True)
class ExpertSet:
    """A pretrained model and its T experts; make one with `from_trees` or `from_safetensors`.

    Attributes:
      names: one name an expert (task), unique, in task order.
      layout: which axis of a kernel is the output: "flax" (in, out) or "torch" (out, in).
      leaves: leaf name to shape and dtype, the same for all experts, sorted by name.
    """

    names: tuple[str, ...]
    layout: Layout
    leaves: Mapping[str, jax.ShapeDtypeStruct]
    _pretrained: Source
    _experts: tuple[Source, ...]

    @classmethod
    def from_trees(
        cls,
        pretrained: Params,
        experts: Sequence[Params],
        *,
        names: Sequence[str] | None = None,
        layout: Layout = "flax",
        exclude: Sequence[str] = (),
        check_finite: bool = True,
    ) -> "ExpertSet":
        """Takes trees that are in memory.

        Args:
          pretrained: nested dict of arrays.
          experts: T nested dicts with the same leaves, shapes and dtypes.
          names: T unique names; "task_0", "task_1", ... when not given.
          layout: "flax" or "torch".
          exclude: regular expressions of leaves that are left out, such as per-task heads.
          check_finite: whether to look for NaN and Inf in all leaves now.

        Returns:
          The expert set; no leaf is copied.

        Raises:
          ValueError: if there is no expert, the names are not T unique names, or an expert has a
            missing, extra or misshaped leaf, another dtype, NaN or Inf; all problems are listed.
        """
        sources = [TreeSource(expert) for expert in experts]
        return cls._checked(TreeSource(pretrained), sources, names, layout, exclude, check_finite)

    @classmethod
    def from_safetensors(
        cls,
        pretrained: str | os.PathLike[str],
        experts: Sequence[str | os.PathLike[str]],
        *,
        names: Sequence[str] | None = None,
        layout: Layout = "torch",
        exclude: Sequence[str] = (),
        check_finite: bool = True,
    ) -> "ExpertSet":
        """Takes safetensors files, of which only the headers are kept in memory.

        Args:
          pretrained: path of the pretrained model's file.
          experts: T paths.
          names: T unique names; the files' stems when not given, where those are unique.
          layout: "torch" (Hugging Face files) or "flax" (files that this package writes).
          exclude: regular expressions of leaves that are left out, such as per-task heads.
          check_finite: whether to read every leaf once now, to look for NaN and Inf.

        Returns:
          The expert set.

        Raises:
          ValueError: as `from_trees`, and for a missing, truncated or malformed file.
        """
        sources = [SafetensorsSource(path) for path in experts]
        if names is None and len({source.path.stem for source in sources}) == len(sources):
            names = [source.path.stem for source in sources]
        return cls._checked(
            SafetensorsSource(pretrained), sources, names, layout, exclude, check_finite
        )

    @classmethod
    def _checked(
        cls,
        pretrained: Source,
        experts: Sequence[Source],
        names: Sequence[str] | None,
        layout: Layout,
        exclude: Sequence[str],
        check_finite: bool,
    ) -> "ExpertSet":
        if names is None:
            names = [f"task_{index}" for index in range(len(experts))]
        if not experts:
            raise ValueError("experts: got T = 0, expected at least one expert")
        if isinstance(names, str) or len(names) != len(experts) or len(set(names)) != len(names):
            raise ValueError(f"names: got {names!r}, expected {len(experts)} unique names")
        if isinstance(exclude, str):
            raise ValueError(f"exclude: got {exclude!r}, expected a sequence of patterns")
        leaves = _kept(pretrained, exclude)
        if not any(tree.is_float(spec.dtype) for spec in leaves.values()):
            raise ValueError("pretrained: no leaf is left to merge")
        tree.unflatten(leaves)
        for name, spec in leaves.items():
            tree.matrix_view(name, spec.shape, layout)
        problems = []
        for task, expert in zip(names, experts, strict=True):
            problems += _mismatches(task, leaves, _kept(expert, exclude))
        if check_finite and not problems:
            for owner, source in zip(("pretrained", *names), (pretrained, *experts), strict=True):
                problems += _not_finite(owner, source, leaves)
        if problems:
            raise ValueError("the experts do not fit:\n  " + "\n  ".join(problems))
        return cls(tuple(names), layout, leaves, pretrained, tuple(experts))

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self._experts)

    @property
    def float_leaves(self) -> list[str]:
        """The leaves that are merged; the others (integer, bool) are copied."""
        return [name for name, spec in self.leaves.items() if tree.is_float(spec.dtype)]

    def pretrained(self, name: str) -> Array:
        """One leaf of the pretrained model: [*shape], its own dtype."""
        return self._pretrained.read(name)

    def expert(self, name: str, task: int) -> Array:
        """One leaf of one expert: [*shape], its own dtype."""
        return self._experts[task].read(name)

    def stacked(self, name: str) -> jax.Array:
        """One leaf of all experts: [T, *shape], float32 (float leaves)."""
        leaves = [source.read(name) for source in self._experts]
        stack = jnp.stack if isinstance(leaves[0], jax.Array) else np.stack
        return jnp.asarray(stack(leaves), dtype=jnp.float32)

    def task_vectors(self, name: str) -> jax.Array:
        """tau_t = theta_t - theta_0 of one leaf (arXiv:2212.04089): [T, *shape], float32."""
        return self.stacked(name) - jnp.asarray(self.pretrained(name), dtype=jnp.float32)

    def pretrained_params(self) -> Params:
        """The whole pretrained model, as a nested dict."""
        return tree.unflatten({name: self.pretrained(name) for name in self.leaves})

    def expert_params(self, task: int) -> Params:
        """One whole expert, as a nested dict."""
        return tree.unflatten({name: self.expert(name, task) for name in self.leaves})


def task_vectors(experts: ExpertSet) -> Params:
    """tau_t = theta_t - theta_0 (Task Arithmetic, arXiv:2212.04089, section 2) of every float leaf.

    Holds all T task vectors in memory; methods use `ExpertSet.task_vectors`, a leaf at a time.

    Returns:
      Nested dict of [T, *shape], float32.
    """
    return tree.unflatten({name: experts.task_vectors(name) for name in experts.float_leaves})


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or tree.is_float(dtype)


def _kept(source: Source, exclude: Iterable[str]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: spec
        for name, spec in sorted(source.leaves.items())
        if not tree.matches_any(exclude, name)
    }


def _mismatches(
    task: str,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    got: Mapping[str, jax.ShapeDtypeStruct],
) -> list[str]:
    problems = [
        f"{task}: missing leaf {name}{tree.did_you_mean(name, set(got) - set(expected))}"
        for name in expected
        if name not in got
    ]
    for name, spec in got.items():
        if name not in expected:
            suggestion = tree.did_you_mean(name, set(expected) - set(got))
            problems.append(f"{task}: extra leaf {name}{suggestion}")
        elif spec.shape != expected[name].shape:
            problems.append(
                f"{task}: {name} has shape {spec.shape}, expected {expected[name].shape}"
            )
        elif spec.dtype != expected[name].dtype:
            problems.append(
                f"{task}: {name} has dtype {spec.dtype}, expected {expected[name].dtype}"
            )
    return problems


def _not_finite(owner: str, source: Source, leaves: Iterable[str]) -> list[str]:
    problems = []
    for name in leaves:
        leaf = source.read(name)
        if isinstance(leaf, Tracer) or not tree.is_float(leaf.dtype):
            continue
        values = np.asarray(leaf)
        if not np.isfinite(values).all():
            bad = int(np.size(values) - np.isfinite(values).sum())
            problems.append(f"{owner}: {name} has {bad} values that are NaN or Inf")
    return problems
