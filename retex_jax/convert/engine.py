"""Converts parameters between torch and Flax names and layouts, by one table of rules a model.

A rule pairs two name templates, such as "encoder.layer.{i}.norm1.weight" and
"blocks_{i}/norm1/scale", where "{i}" stands for a whole number, with a transform that can be
undone. The same table serves both directions, and the first rule whose template matches a name
decides. A rule may name several Flax templates for one torch array that holds several parameters,
such as a fused query, key and value. Nothing is skipped silently: what the table neither converts
nor lists as ignored is an error, and every problem of a file is reported at once.

Numerics: transforms only move elements, so a round trip is bitwise equal where the dtypes agree.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from retex_jax import tree
from retex_jax.convert.transforms import (
    CONV,
    IDENTITY,
    TRANSPOSE,
    Transform,
    drop_leading,
    permute,
    split,
)

__all__ = [
    "CONV",
    "IDENTITY",
    "TRANSPOSE",
    "ConvertedSource",
    "Rule",
    "Table",
    "Transform",
    "check",
    "drop_leading",
    "permute",
    "split",
    "to_flax",
    "to_torch",
    "torch_names",
]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table.

    Attributes:
      torch: template of the torch name, used in both directions.
      flax: template of the Flax name, with the same placeholders; or several, for a torch array
        that holds several parameters, in the order of the transform's arrays.
      transform: between the two layouts.
      aliases: further torch templates that mean the same, read but never written.
    """

    torch: str
    flax: str | tuple[str, ...]
    transform: Transform = IDENTITY
    aliases: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """The Flax templates, as a tuple in any case."""
        return (self.flax,) if isinstance(self.flax, str) else self.flax


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


class ConvertedSource:
    """Torch tensors seen as the leaves of a Flax model, one leaf at a time.

    Nothing is read before `read` asks for it: the check needs only shapes and dtypes. It is a
    `retex_jax.experts.Source`.

    Attributes:
      leaves: Flax leaf name -> `jax.ShapeDtypeStruct`, sorted by name.
    """

    leaves: dict[str, jax.ShapeDtypeStruct]

    def __init__(self, tensors: Mapping[str, np.ndarray], table: Table, expected: Mapping):
        """Finds the tensor of each leaf.

        Args:
          tensors: torch name -> array in torch layout, such as a `Snapshot`.
          table: the rules.
          expected: as for `to_flax`.

        Raises:
          ValueError: as `to_flax`.
        """
        self.leaves = _flatten(expected)
        self._tensors = tensors
        self._places = _match(_specs(tensors), table, self.leaves)

    def view(self, name: str) -> np.ndarray:
        """One leaf in Flax layout but its stored dtype; it may share memory with the tensor."""
        key, rule, part = self._places[name]
        return _forward(rule, np.asarray(self._tensors[key]))[part]

    def read(self, name: str) -> np.ndarray:
        """One leaf: [*shape] in the expected dtype, contiguous and in memory of its own."""
        return np.array(self.view(name), self.leaves[name].dtype, order="C")


def to_flax(
    tensors: Mapping[str, np.ndarray],
    table: Table,
    expected: Mapping,
    sharding: jax.sharding.Sharding | Callable[..., jax.sharding.Sharding] | None = None,
) -> dict:
    """Converts torch tensors to the parameters of a Flax model.

    Every name and shape is checked before the first tensor is read. Then one leaf at a time is read,
    rearranged, cast and placed: beside the result, no more than one leaf is in memory at once.

    Args:
      tensors: torch name -> array in torch layout, such as a `Snapshot`.
      table: the rules.
      expected: what the model needs: nested dict of `jax.ShapeDtypeStruct`, or the same with names
        "a/b/c".
      sharding: where the leaves go: one sharding for all, or a function of a leaf's name and shape;
        each device is given its own part only. None for NumPy arrays.

    Returns:
      Nested dict of arrays in Flax layout with the expected shapes. An array whose floating dtype
      differs from the expected one is cast to it.

    Raises:
      ValueError: if a tensor matches no rule or leads to a name that the model does not have, two
        tensors lead to one name, a name of the model is left over, or a shape or kind of dtype
        differs. All are listed, with the nearest known name where there is one.
    """
    source = ConvertedSource(tensors, table, expected)
    return tree.unflatten({name: _placed(source, name, sharding) for name in source.leaves})


def _placed(source, name, sharding):
    if sharding is None:
        return source.read(name)
    spec, view = source.leaves[name], source.view(name)
    if not isinstance(sharding, jax.sharding.Sharding):
        sharding = sharding(name, tuple(spec.shape))
    array = jax.make_array_from_callback(
        tuple(spec.shape), sharding, lambda index: np.array(view[index], spec.dtype, order="C")
    )
    return array.block_until_ready()  # or the buffers of many leaves would wait in a queue


def check(specs: Mapping, table: Table, expected: Mapping) -> dict[str, str]:
    """Checks that `to_flax` could convert tensors of these shapes, without having them.

    Args:
      specs: torch name -> anything with a shape and a dtype, such as `jax.ShapeDtypeStruct`.
      table: the rules.
      expected: as for `to_flax`.

    Returns:
      Flax leaf name -> the torch name that it is read from.

    Raises:
      ValueError: as `to_flax`.
    """
    places = _match(specs, table, _flatten(expected))
    return {name: key for name, (key, _, _) in places.items()}


def to_torch(params: Mapping, table: Table) -> dict[str, np.ndarray]:
    """Converts the parameters of a Flax model to torch names and layouts.

    Args:
      params: nested dict of arrays, or the same with names "a/b/c".
      table: the rules.

    Returns:
      Torch name -> contiguous array in torch layout, dtype unchanged.

    Raises:
      ValueError: if a parameter matches no rule, two lead to one torch name, a torch array lacks one
        of its several parameters, or one has another number of axes than its rule needs. All are
        listed, with the nearest known name where there is one.
    """
    flat = _flatten(params)
    members: dict[str, dict[int, str]] = {}
    rules: dict[str, Rule] = {}
    problems = []
    for name in flat:
        match = _to_torch_rule(name, table)
        if match is None:
            number = re.search(r"\d+", name)
            templates = [template for rule in table.rules for template in rule.members]
            known = [t.replace("{i}", number[0] if number else "0") for t in templates]
            problems.append(f"extra: {name}{_nearest(name, known)}")
            continue
        key, rule, part = match
        if rules.setdefault(key, rule) is not rule or part in members.get(key, {}):
            problems.append(f"duplicate: {name} and another parameter both mean {key}")
        else:
            members.setdefault(key, {})[part] = name
    tensors: dict[str, np.ndarray] = {}
    for key, parts in members.items():
        rule = rules[key]
        names = [parts[part] for part in sorted(parts)]
        if len(names) < len(rule.members):
            values = _pattern(rule.torch).fullmatch(key).groupdict()
            absent = [
                template.format(**values)
                for part, template in enumerate(rule.members)
                if part not in parts
            ]
            problems += [f"missing: {name} (for {key}){_nearest(name, flat)}" for name in absent]
            continue
        arrays = [np.asarray(flat[name]) for name in names]
        try:
            if len({x.dtype for x in arrays}) > 1:
                raise ValueError(f"dtypes {', '.join(str(x.dtype) for x in arrays)}")
            tensor = rule.transform.inverse(*arrays)
            if rule.transform.ndim not in (None, tensor.ndim):
                raise ValueError(f"{tensor.ndim} axes")
        except ValueError as error:
            shapes = ", ".join(str(list(x.shape)) for x in arrays)
            problems.append(
                f"misshaped: {', '.join(names)}: {shapes} does not fit {rule.transform.name}: {error}"
            )
            continue
        tensors[key] = np.ascontiguousarray(tensor).reshape(tensor.shape)
    if problems:
        raise ValueError(_message(f"cannot convert from {table.name}", problems))
    return tensors


def torch_names(names: Iterable[str], table: Table) -> dict[str, str]:
    """Says what parameters are called in torch.

    Args:
      names: Flax leaf names.
      table: the rules.

    Returns:
      Flax name -> torch name, of those that are a torch array of their own.
    """
    matches = {name: _to_torch_rule(name, table) for name in names}
    return {
        name: match[0]
        for name, match in matches.items()
        if match and isinstance(match[1].flax, str)
    }


def _match(specs: Mapping, table: Table, expected: Mapping) -> dict[str, tuple[str, Rule, int]]:
    """Returns for each expected name its torch name, the rule and which of its members it is."""
    wanted = {name: match[0] for name in expected if (match := _to_torch_rule(name, table))}
    places: dict[str, tuple[str, Rule, int]] = {}
    sources: dict[str, tuple[Rule, tuple[str, ...]]] = {}
    extra, lacking, duplicate = [], [], []
    for key in specs:
        if any(re.fullmatch(pattern, key) for pattern in table.ignore):
            continue
        match = _to_flax_rule(key, table)
        if match is None or not any(name in expected for name in match[1]):
            extra.append(key)
            continue
        rule, names = match
        sources[key] = match
        for part, name in enumerate(names):
            if name not in expected:
                lacking.append(f"{key} holds {name}, which the model does not have")
            elif name in places:
                duplicate.append(f"{places[name][0]} and {key} both mean {name}")
            else:
                places[name] = (key, rule, part)
    missing = [name for name in expected if name not in places]
    problems = [f"extra: {key}{_nearest(key, wanted.values())}" for key in extra]
    problems += [f"extra: {problem}" for problem in lacking]
    problems += [
        f"missing: {key} (for {name}){_nearest(key, extra)}"
        for name, key in ((name, wanted.get(name) or "?") for name in missing)
    ]
    problems += [f"duplicate: {pair}" for pair in duplicate]
    for key, (rule, names) in sources.items():
        if any(places.get(name, (None,))[0] != key for name in names):
            continue  # already a problem
        try:
            _check_shape(specs[key], rule, [expected[name] for name in names])
        except ValueError as error:
            problems.append(f"misshaped: {key} (for {', '.join(names)}): {error}")
    if problems:
        raise ValueError(_message(f"cannot convert to {table.name}", problems))
    return places


def _check_shape(spec, rule: Rule, expected: list) -> None:
    shape = tuple(spec.shape)
    if rule.transform.ndim not in (None, len(shape)):
        raise ValueError(f"shape {list(shape)}, expected {rule.transform.ndim} axes")
    try:
        got = _forward(rule, _hollow(shape))
    except ValueError as error:
        raise ValueError(
            f"shape {list(shape)} does not fit {rule.transform.name}: {error}"
        ) from None
    if any(x.shape != tuple(want.shape) for x, want in zip(got, expected, strict=True)):
        needed = rule.transform.inverse(*(_hollow(tuple(want.shape)) for want in expected))
        raise ValueError(f"shape {list(shape)}, expected {list(needed.shape)}")
    for want in expected:
        both_float = tree.is_float(spec.dtype) and tree.is_float(want.dtype)
        if np.dtype(spec.dtype) != np.dtype(want.dtype) and not both_float:
            raise ValueError(f"dtype {np.dtype(spec.dtype)}, expected {np.dtype(want.dtype)}")


def _hollow(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape that takes no memory, to see what a transform makes of the shape."""
    return np.broadcast_to(np.zeros((), np.bool_), shape)


def _forward(rule: Rule, x: np.ndarray) -> tuple[np.ndarray, ...]:
    got = rule.transform.forward(x)
    parts = got if isinstance(got, tuple) else (got,)
    if len(parts) != len(rule.members):
        raise ValueError(f"{len(parts)} part(s) for the {len(rule.members)} of {rule.torch}")
    return parts


def _specs(tensors: Mapping) -> Mapping:
    if (known := getattr(tensors, "specs", None)) is not None:
        return known
    specs = {}
    for name, x in tensors.items():
        specs[name] = x if hasattr(x, "shape") and hasattr(x, "dtype") else np.asarray(x)
    return specs


def _flatten(params: Mapping) -> dict:
    nested = any(isinstance(value, Mapping) for value in params.values())
    return tree.flatten(params) if nested else dict(sorted(params.items()))


@functools.cache
def _pattern(template: str) -> re.Pattern:
    """Compiles a template: "{i}" matches a whole number, the rest itself."""
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(rf"(?P<{p}>0|[1-9]\d*)" if n % 2 else re.escape(p) for n, p in enumerate(parts))
    )


def _to_flax_rule(key: str, table: Table) -> tuple[Rule, tuple[str, ...]] | None:
    for prefix in table.prefixes:
        if key.startswith(prefix):
            key = key[len(prefix) :]
            break
    for rule in table.rules:
        for template in (rule.torch, *rule.aliases):
            if match := _pattern(template).fullmatch(key):
                return rule, tuple(name.format(**match.groupdict()) for name in rule.members)
    return None


def _to_torch_rule(name: str, table: Table) -> tuple[str, Rule, int] | None:
    for rule in table.rules:
        for part, template in enumerate(rule.members):
            if match := _pattern(template).fullmatch(name):
                return rule.torch.format(**match.groupdict()), rule, part
    return None


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(set(known)), n=1, cutoff=0.6)
    return f"; nearest known name: {close[0]}" if close else ""


def _message(head: str, problems: list[str]) -> str:
    return f"{head}: {len(problems)} problem(s)\n" + "\n".join("  " + p for p in problems)
