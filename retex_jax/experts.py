"""One pretrained model and T experts of it, read leaf by leaf.

An `ExpertSet` is what every method fits on. It checks once, early and completely, that the experts
belong to the pretrained model, and then hands out one leaf of all experts at a time, so that a method
needs the memory of one leaf's stack, not of T models. The leaves come from any `Source`: trees in
memory, safetensors files, which are read through memory maps, or LoRA adapters over a pretrained model.

A method that works element by element needs even less: it reads a leaf in `parts`, which stay in the
processor's cache.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import expert_checks, tree
from retex_jax.buffers import aligned_empty, read_ahead, scratch
from retex_jax.lora.source import LoraSource
from retex_jax.sources import (
    SafetensorsSource,
    Source,
    TreeSource,
    mapped,
    read_part,
    read_safetensors,
)
from retex_jax.typing import Array, Layout, Params

__all__ = [
    "PART_SIZES",
    "ExpertSet",
    "SafetensorsSource",
    "Source",
    "TreeSource",
    "read_safetensors",
    "task_vectors",
]

_Source = TypeVar("_Source")

PART_SIZES = (1 << 12, 1 << 15, 1 << 18)
"""Elements of a part but for a leaf's last: few sizes, as mergers compile for each of them.

The largest is 1 MiB of float32 an expert, so that the parts of all experts stay in the cache. All are multiples
of 8, so that masks are packed in parts as they are whole.
"""
# Elements of a part of all experts, where they are many.
_PARTS = 1 << 23


@dataclass(frozen=True)
class ExpertSet:
    """A pretrained model and its T experts; make one with one of the `from_` methods.

    Where the pretrained model is None, methods that read it raise ValueError; see `rebased`.

    Attributes:
      names: one name an expert (task), unique, in task order.
      layout: which axis of a kernel is the output: "flax" (in, out) or "torch" (out, in).
      leaves: leaf name to shape and dtype, the same for all experts, sorted by name.
    """

    names: tuple[str, ...]
    layout: Layout
    leaves: Mapping[str, jax.ShapeDtypeStruct]
    _pretrained: Source | None
    _experts: tuple[Source, ...]

    @classmethod
    def from_trees(
        cls,
        pretrained: Params | None,
        experts: Sequence[Params],
        *,
        names: Sequence[str] | None = None,
        layout: Layout = "flax",
        exclude: Sequence[str] = (),
        check_finite: bool = True,
    ) -> "ExpertSet":
        """Takes trees that are in memory.

        Args:
          pretrained: nested dict of arrays, or None where it is not at hand.
          experts: T nested dicts with the same leaves, shapes and dtypes.
          names: T unique names; "task_0", "task_1", ... when not given.
          layout: "flax" or "torch".
          exclude: regular expressions of leaves that are left out, such as per-task heads.
          check_finite: whether to look for NaN and Inf in all leaves now.

        Returns:
          The expert set; no leaf is copied.

        Raises:
          ValueError: if there is no expert, the names are not T unique names, `exclude` is not a
            sequence of regular expressions, or an expert has a missing, extra or misshaped leaf,
            another dtype, NaN or Inf; all problems are listed.
        """
        sources = [TreeSource(expert) for expert in experts]
        return cls.from_sources(
            None if pretrained is None else TreeSource(pretrained),
            sources,
            names=names,
            layout=layout,
            exclude=exclude,
            check_finite=check_finite,
        )

    @classmethod
    def from_safetensors(
        cls,
        pretrained: str | os.PathLike[str] | None,
        experts: Sequence[str | os.PathLike[str]],
        *,
        names: Sequence[str] | None = None,
        layout: Layout = "torch",
        exclude: Sequence[str] = (),
        check_finite: bool = True,
    ) -> "ExpertSet":
        """Takes safetensors checkpoints, of which only the headers are kept in memory.

        Args:
          pretrained: path of the pretrained model: a file, or a folder with model.safetensors or with
            an index and its shards; or None where it is not at hand.
          experts: T paths.
          names: T unique names; the files' stems (the folders' names) when not given, where those are
            unique.
          layout: "torch" (Hugging Face files) or "flax" (files that this package writes).
          exclude: regular expressions of leaves that are left out, such as per-task heads.
          check_finite: whether to read every leaf once now, to look for NaN and Inf.

        Returns:
          The expert set.

        Raises:
          ValueError: as `from_trees`, and for missing, truncated or malformed files, all of which
            are listed, and if `experts` is one path.
        """
        _check_many("experts", experts)
        problems: list[str] = []
        base = _opened(SafetensorsSource, [] if pretrained is None else [pretrained], problems)
        sources = _opened(SafetensorsSource, experts, problems)
        if problems:
            raise ValueError("\n".join(problems))
        return cls.from_sources(
            base[0] if base else None,
            sources,
            names=_own_names(sources) if names is None else names,
            layout=layout,
            exclude=exclude,
            check_finite=check_finite,
        )

    @classmethod
    def from_lora(
        cls,
        pretrained: Source | str | os.PathLike[str],
        adapters: Sequence[LoraSource | str | os.PathLike[str]],
        *,
        names: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        check_finite: bool = True,
    ) -> "ExpertSet":
        """Takes PEFT LoRA adapters; each is added to the pretrained model as a leaf is read.

        Args:
          pretrained: the adapters' base model, in torch layout: a source, or a path as
            `from_safetensors` takes it.
          adapters: T adapter folders, or `LoraSource`s made of them with the same pretrained source
            (to read their heads from, or with another `transposed`).
          names: T unique names; the folders' names when not given, where those are unique.
          exclude: regular expressions of leaves that are left out, such as per-task heads.
          check_finite: whether to read every leaf once now, to look for NaN and Inf.

        Returns:
          The expert set, in torch layout.

        Raises:
          ValueError: as `from_trees`, as `LoraSource` for all adapters at once, and if `adapters` is
            one path.
        """
        _check_many("adapters", adapters)
        if isinstance(pretrained, str | os.PathLike):
            pretrained = SafetensorsSource(pretrained)

        def opened(adapter: Any) -> LoraSource:
            return adapter if isinstance(adapter, LoraSource) else LoraSource(adapter, pretrained)

        problems: list[str] = []
        sources = _opened(opened, adapters, problems)
        if problems:
            raise ValueError("\n".join(problems))
        return cls.from_sources(
            pretrained,
            sources,
            names=_own_names(sources) if names is None else names,
            layout="torch",
            exclude=exclude,
            check_finite=check_finite,
        )

    @classmethod
    def from_sources(
        cls,
        pretrained: Source | None,
        experts: Sequence[Source],
        *,
        names: Sequence[str] | None = None,
        layout: Layout,
        exclude: Sequence[str] = (),
        check_finite: bool = True,
    ) -> "ExpertSet":
        """Takes anything that names its leaves and reads one of them at a time.

        Args:
          pretrained: source of the pretrained model, or None where it is not at hand: the first expert
            then says which leaves there are, and gives those that are not float.
          experts: T sources.
          names: T unique names; "task_0", "task_1", ... when not given.
          layout: "flax" or "torch", of all sources.
          exclude: regular expressions of leaves that are left out, such as per-task heads.
          check_finite: whether to read every leaf once now, to look for NaN and Inf.

        Returns:
          The expert set; nothing but the sources is kept.

        Raises:
          ValueError: as `from_trees`.
        """
        if names is None:
            names = [f"task_{index}" for index in range(len(experts))]
        if not experts:
            raise ValueError("experts: got T = 0, expected at least one expert")
        if isinstance(names, str) or len(names) != len(experts) or len(set(names)) != len(names):
            raise ValueError(f"names: got {names!r}, expected {len(experts)} unique names")
        expert_checks.check_patterns(exclude)
        leaves = expert_checks.kept(experts[0] if pretrained is None else pretrained, exclude)
        if not any(tree.is_float(spec.dtype) for spec in leaves.values()):
            owner = names[0] if pretrained is None else "pretrained"
            raise ValueError(f"{owner}: no leaf is left to merge")
        tree.unflatten(leaves)
        for name, spec in leaves.items():
            tree.matrix_view(name, spec.shape, layout)
        problems = []
        for task, expert in zip(names, experts, strict=True):
            problems += expert_checks.mismatches(task, leaves, expert_checks.kept(expert, exclude))
        if check_finite and not problems:
            is_file = isinstance(pretrained, SafetensorsSource)
            base = f"pretrained ({pretrained.path})" if is_file else "pretrained"
            for owner, source in zip((base, *names), (pretrained, *experts), strict=True):
                if source is not None:
                    problems += expert_checks.not_finite(owner, source, leaves)
        if problems:
            raise ValueError("the experts do not fit:\n  " + "\n  ".join(problems))
        return cls(tuple(names), layout, leaves, pretrained, tuple(experts))

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self._experts)

    @property
    def has_pretrained(self) -> bool:
        """Whether `pretrained` can be read."""
        return self._pretrained is not None

    @property
    def float_leaves(self) -> list[str]:
        """The leaves that are merged; the others (integer, bool) are copied."""
        return [name for name, spec in self.leaves.items() if tree.is_float(spec.dtype)]

    def parts(self, name: str) -> Sequence[slice | None]:
        """The ranges of the flattened leaf in which it is best read; [None], all of it, where it must be.

        A leaf is read in parts where all of its sources have it in host memory or in a mapped file.
        """
        sources = [source for source in (self._pretrained, *self._experts) if source is not None]
        if any(mapped(source, name) is None for source in sources):
            return [None]
        size = math.prod(self.leaves[name].shape)
        most = max(PART_SIZES[0], _PARTS // self.num_tasks)
        step = max(size for size in PART_SIZES if size <= most)
        return [slice(start, min(start + step, size)) for start in range(0, max(size, 1), step)]

    def pretrained(self, name: str, part: slice | None = None) -> Array:
        """One leaf of the pretrained model: [*shape], its own dtype; one of its `parts`: [n].

        Raises:
          ValueError: if there is no pretrained model and the leaf is float; others are the first expert's.
        """
        if self._pretrained is not None:
            return read_part(self._pretrained, name, part)
        if tree.is_float(self.leaves[name].dtype):
            raise ValueError(
                f"pretrained: got None, but {name} of it is needed; take a method that works without, or "
                "let a merged model take its place: experts.rebased(merged), with merged = "
                "METHODS['weight_average'].fit(experts)"
            )
        return read_part(self._experts[0], name, part)

    def expert(self, name: str, task: int) -> Array:
        """One leaf of one expert: [*shape], its own dtype."""
        return self._experts[task].read(name)

    def read_ahead(self, names: Iterable[str]) -> None:
        """Has the system read leaves of all experts from the disk meanwhile, where they are mapped files."""
        for name in names:
            for source in self._experts:
                leaf = mapped(source, name)
                if leaf is not None:
                    read_ahead(leaf)

    def stacked(self, name: str, part: slice | None = None) -> Array:
        """One leaf of all experts, float32 (float leaves): [T, *shape].

        Of one of its `parts`: [T, n], in memory that the thread's next call for a part takes again.
        """
        leaves = [read_part(source, name, part) for source in self._experts]
        if part is not None:
            return np.stack(leaves, out=scratch(len(leaves), leaves[0].size), casting="unsafe")
        if any(isinstance(leaf, jax.Array) for leaf in leaves):
            return jnp.asarray(jnp.stack(leaves), dtype=jnp.float32)
        stack = aligned_empty([len(leaves), *leaves[0].shape], np.float32)
        return jax.device_put(np.stack(leaves, out=stack, casting="unsafe"), may_alias=True)

    @overload
    def task_vectors(self, name: str, part: None = None) -> jax.Array: ...

    @overload
    def task_vectors(self, name: str, part: slice | None) -> Array: ...

    def task_vectors(self, name: str, part: slice | None = None) -> Array:
        """tau_t = theta_t - theta_0 of one leaf (arXiv:2212.04089), or of a part, as `stacked`."""
        if part is None:
            stacked = ExpertSet.stacked(self, name)
            return stacked - jnp.asarray(self.pretrained(name), dtype=jnp.float32)
        pretrained = np.asarray(self.pretrained(name, part), np.float32)
        stacked = scratch(self.num_tasks, pretrained.size)
        for row, source in zip(stacked, self._experts, strict=True):
            np.subtract(
                read_part(source, name, part),
                pretrained,
                out=row,
                dtype=np.float32,
                casting="unsafe",
            )
        return stacked

    def rebased(self, merged: Params) -> "ExpertSet":
        """The same experts with a merged model in place of the pretrained one.

        Every method then works on difference vectors d_t = theta_t - theta_merge where it takes task vectors
        tau_t = theta_t - theta_0 (DTS, section 3.1 and appendix D.5, tables 15 to 18), and adds to theta_merge.

        Args:
          merged: nested dict with the experts' leaves, shapes and dtypes, such as a merger returns.

        Returns:
          The expert set; no leaf is copied.

        Raises:
          ValueError: if a leaf of `merged` is missing, extra or misshaped, has another dtype, NaN or Inf;
            all problems are listed.
        """
        source = TreeSource(merged)
        expected = {  # as a merger stores it: without 64-bit types where JAX has none
            name: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
            for name, leaf in self.leaves.items()
        }
        got = {
            name: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
            for name, leaf in sorted(source.leaves.items())
        }
        problems = expert_checks.mismatches("merged", expected, got)
        problems = problems or expert_checks.not_finite("merged", source, got)
        if problems:
            raise ValueError("the merged model does not fit:\n  " + "\n  ".join(problems))
        return replace(self, _pretrained=source)

    def take(self, tasks: Sequence[int]) -> "ExpertSet":
        """Some of the experts, in this order, of the same pretrained model.

        Args:
          tasks: different task ids, 0 to T - 1.

        Returns:
          The expert set; no leaf is copied.

        Raises:
          ValueError: if there is no task, or they are not different ids in range.
        """
        chosen = list(tasks)
        if not chosen or len(set(chosen)) < len(chosen) or set(chosen) - set(range(self.num_tasks)):
            raise ValueError(
                f"tasks: got {chosen}, expected one or more different ids from 0 to {self.num_tasks - 1}"
            )
        return replace(
            self,
            names=tuple(self.names[task] for task in chosen),
            _experts=tuple(self._experts[task] for task in chosen),
        )

    def only(self, leaves: Iterable[str]) -> "ExpertSet":
        """The same experts with some of their leaves.

        Args:
          leaves: their names.

        Returns:
          The expert set; no leaf is copied.

        Raises:
          ValueError: if a name is none of a leaf.
        """
        names = list(leaves)
        if unknown := sorted(set(names) - self.leaves.keys()):
            raise ValueError(f"leaves: got {unknown}, expected some of the experts' leaves")
        return replace(self, leaves={name: self.leaves[name] for name in names})

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


def _check_many(name: str, paths: object) -> None:
    if isinstance(paths, str | os.PathLike):
        raise ValueError(f"{name}: got {paths!r}, expected a sequence of paths: [{paths!r}]")


def _opened(
    open_one: Callable[[Any], _Source], places: Iterable[Any], problems: list[str]
) -> list[_Source]:
    """The sources that can be opened; what is wrong with the others is added to `problems`."""
    sources = []
    for place in places:
        try:
            sources.append(open_one(place))
        except ValueError as error:
            problems.append(str(error))
    return sources


def _own_names(sources: Sequence[SafetensorsSource | LoraSource]) -> list[str] | None:
    names = [source.name for source in sources]
    return names if len(set(names)) == len(names) else None
