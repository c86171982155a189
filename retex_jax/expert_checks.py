"""Whether experts belong to their pretrained model: what of their leaves does not fit."""

import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.core import Tracer

from retex_jax import tree
from retex_jax.sources import Source


def check_patterns(exclude: Sequence[str]) -> None:
    """Raises ValueError unless `exclude` is a sequence of regular expressions; names those that are none."""
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise ValueError(f"exclude: got {exclude!r}, expected a sequence of patterns")
    problems = []
    for pattern in exclude:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            problems.append(f"exclude: got {pattern!r}, expected a regular expression ({error})")
    if problems:
        raise ValueError("\n".join(problems))


def kept(source: Source, exclude: Iterable[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves that no pattern leaves out, by name."""
    return {
        name: spec
        for name, spec in sorted(source.leaves.items())
        if not tree.matches_any(exclude, name)
    }


def mismatches(
    task: str,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    got: Mapping[str, jax.ShapeDtypeStruct],
) -> list[str]:
    """Leaves that an expert lacks, has besides, or has in another shape or dtype; one message each."""
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


def not_finite(owner: str, source: Source, leaves: Iterable[str]) -> list[str]:
    """Leaves with NaN or Inf, all of which are read; one message each. Traced leaves are taken as they are."""
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
