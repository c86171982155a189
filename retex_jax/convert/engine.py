"""Converts parameters between torch and Flax names and layouts, by one table of rules a model.

A rule pairs two name templates, such as "encoder.layer.{i}.norm1.weight" and
"blocks_{i}/norm1/scale", where "{i}" stands for a whole number, with a transform that can be
undone. The same table serves both directions, and the first rule whose template matches a name
decides. Nothing is skipped silently: what the table neither converts nor lists as ignored is an
error, and every problem of a file is reported at once.

Numerics: transforms only move elements, so a round trip is bitwise equal where the dtypes agree.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from retex_jax import tree


@dataclasses.dataclass(frozen=True)
class Transform:
    """A rearrangement of one array, and the one that undoes it.

    Attributes:
      name: for error messages.
      ndim: number of axes of the torch array, or None for any.
      forward: from the torch layout to the Flax layout.
      inverse: from the Flax layout to the torch layout.
    """

    name: str
    ndim: int | None
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def permute(name: str, axes: tuple[int, ...]) -> Transform:
    """Returns the transform that permutes axes, as `np.transpose` does.

    Args:
      name: for error messages.
      axes: the torch axis of each Flax axis.

    Returns:
      The transform.
    """
    back = tuple(int(i) for i in np.argsort(axes))
    return Transform(
        name, len(axes), lambda x: np.transpose(x, axes), lambda x: np.transpose(x, back)
    )


def drop_leading(count: int, ndim: int) -> Transform:
    """Returns the transform that drops leading axes of size 1.

    Args:
      count: how many axes are dropped.
      ndim: number of axes of the torch array.

    Returns:
      The transform; its forward raises ValueError where a dropped axis is not of size 1.
    """
    axes = tuple(range(count))
    return Transform(
        f"drop_leading_{count}",
        ndim,
        lambda x: np.squeeze(x, axis=axes),
        lambda x: np.expand_dims(x, axis=axes),
    )


IDENTITY = Transform("identity", None, lambda x: x, lambda x: x)
"""Leaves the array as it is."""

TRANSPOSE = permute("transpose", (1, 0))
"""A torch linear weight [out, in] and a Flax kernel [in, out]."""

CONV = permute("conv", (2, 3, 1, 0))
"""A torch convolution weight OIHW and a Flax kernel HWIO."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table.

    Attributes:
      torch: template of the torch name, used in both directions.
      flax: template of the Flax name, with the same placeholders.
      transform: between the two layouts.
      aliases: further torch templates that mean the same, read but never written.
    """

    torch: str
    flax: str
    transform: Transform = IDENTITY
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """The rules of one model.

    Attributes:
      name: the model, for error messages.
      rules: in order; the first that matches a name decides.
      ignore: regular expressions of torch names (full match) that are read past, such as buffers.
      prefixes: a torch name may start with one of these, which is dropped first; none is written.
    """

    name: str
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()


def to_flax(tensors: Mapping[str, np.ndarray], table: Table, expected: Mapping) -> dict:
    """Converts torch tensors to the parameters of a Flax model.

    Args:
      tensors: torch name -> array in torch layout.
      table: the rules.
      expected: what the model needs: nested dict of `jax.ShapeDtypeStruct`, or the same with names
        "a/b/c".

    Returns:
      Nested dict of arrays in Flax layout with the expected shapes. An array whose floating dtype
      differs from the expected one is cast to it.

    Raises:
      ValueError: if a tensor matches no rule or leads to a name that the model does not have, two
        tensors lead to one name, a name of the model is left over, or a shape or kind of dtype
        differs. All are listed, with the nearest known name where there is one.
    """
    expected = _flatten(expected)
    wanted = {name: rule[0] for name in expected if (rule := _to_torch_rule(name, table))}
    sources: dict[str, tuple[str, Rule]] = {}
    extra, duplicate = [], []
    for key in tensors:
        if any(re.fullmatch(pattern, key) for pattern in table.ignore):
            continue
        match = _to_flax_rule(key, table)
        if match is None or match[0] not in expected:
            extra.append(key)
            continue
        name, rule = match
        if name in sources:
            duplicate.append(f"{sources[name][0]} and {key} both mean {name}")
        else:
            sources[name] = (key, rule)
    missing = [name for name in expected if name not in sources]
    problems = [f"extra: {key}{_nearest(key, wanted.values())}" for key in extra]
    problems += [
        f"missing: {key} (for {name}){_nearest(key, extra)}"
        for name, key in ((name, wanted.get(name) or "?") for name in missing)
    ]
    problems += [f"duplicate: {pair}" for pair in duplicate]

    flat = {}
    for name, (key, rule) in sources.items():
        try:
            flat[name] = _convert(np.asarray(tensors[key]), rule.transform, expected[name])
        except ValueError as error:
            problems.append(f"misshaped: {key} (for {name}): {error}")
    if problems:
        raise ValueError(_message(f"cannot convert to {table.name}", problems))
    return tree.unflatten(flat)


def to_torch(params: Mapping, table: Table) -> dict[str, np.ndarray]:
    """Converts the parameters of a Flax model to torch names and layouts.

    Args:
      params: nested dict of arrays, or the same with names "a/b/c".
      table: the rules.

    Returns:
      Torch name -> contiguous array in torch layout, dtype unchanged.

    Raises:
      ValueError: if a parameter matches no rule, two lead to one torch name, or one has another
        number of axes than its rule needs. All are listed, with the nearest known name where there
        is one.
    """
    tensors: dict[str, np.ndarray] = {}
    problems = []
    for name, value in _flatten(params).items():
        match = _to_torch_rule(name, table)
        if match is None:
            number = re.search(r"\d+", name)
            known = [r.flax.replace("{i}", number[0] if number else "0") for r in table.rules]
            problems.append(f"extra: {name}{_nearest(name, known)}")
            continue
        key, rule = match
        if key in tensors:
            problems.append(f"duplicate: {name} and another parameter both mean {key}")
            continue
        try:
            x = rule.transform.inverse(np.asarray(value))
            if rule.transform.ndim not in (None, x.ndim):
                raise ValueError(f"{x.ndim} axes")
        except ValueError as error:
            shape = list(np.shape(value))
            problems.append(
                f"misshaped: {name}: {shape} does not fit {rule.transform.name}: {error}"
            )
            continue
        tensors[key] = np.ascontiguousarray(x)
    if problems:
        raise ValueError(_message(f"cannot convert from {table.name}", problems))
    return tensors


def _flatten(params: Mapping) -> dict:
    nested = any(isinstance(value, Mapping) for value in params.values())
    return tree.flatten(params) if nested else dict(sorted(params.items()))


def _convert(x, transform, expected):
    if transform.ndim not in (None, x.ndim):
        raise ValueError(f"shape {list(x.shape)}, expected {transform.ndim} axes")
    try:
        y = transform.forward(x)
    except ValueError as error:
        raise ValueError(f"shape {list(x.shape)} does not fit {transform.name}: {error}") from None
    if y.shape != tuple(expected.shape):
        needed = list(transform.inverse(np.empty(expected.shape, np.bool_)).shape)
        raise ValueError(f"shape {list(x.shape)}, expected {needed}")
    if y.dtype == expected.dtype:
        return np.ascontiguousarray(y)
    # bfloat16 comes from ml_dtypes, where NumPy's kind is "V": tell floats by what they promote to.
    if not (_is_float(y.dtype) and _is_float(np.dtype(expected.dtype))):
        raise ValueError(f"dtype {y.dtype}, expected {expected.dtype}")
    return np.ascontiguousarray(y.astype(expected.dtype))


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


@functools.cache
def _pattern(template: str) -> re.Pattern:
    """Compiles a template: "{i}" matches a whole number, the rest itself."""
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(rf"(?P<{p}>0|[1-9]\d*)" if n % 2 else re.escape(p) for n, p in enumerate(parts))
    )


def _to_flax_rule(key: str, table: Table) -> tuple[str, Rule] | None:
    for prefix in table.prefixes:
        if key.startswith(prefix):
            key = key[len(prefix) :]
            break
    for rule in table.rules:
        for template in (rule.torch, *rule.aliases):
            if match := _pattern(template).fullmatch(key):
                return rule.flax.format(**match.groupdict()), rule
    return None


def _to_torch_rule(name: str, table: Table) -> tuple[str, Rule] | None:
    for rule in table.rules:
        if match := _pattern(rule.flax).fullmatch(name):
            return rule.torch.format(**match.groupdict()), rule
    return None


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(set(known)), n=1, cutoff=0.6)
    return f"; nearest known name: {close[0]}" if close else ""


def _message(head: str, problems: list[str]) -> str:
    return f"{head}: {len(problems)} problem(s)\n" + "\n".join("  " + p for p in problems)
