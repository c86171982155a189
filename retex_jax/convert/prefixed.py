"""Rules of a part, written for the whole model that holds it."""

import dataclasses
from collections.abc import Iterable

from retex_jax.convert.engine import Rule


def prefixed(rules: Iterable[Rule], torch: str = "", flax: str = "") -> tuple[Rule, ...]:
    """Puts prefixes before both names of every rule.

    Args:
      rules: of the part.
      torch: such as "bert.".
      flax: such as "backbone/".

    Returns:
      The rules of the part inside the whole, in the same order.
    """
    return tuple(
        dataclasses.replace(
            rule,
            torch=torch + rule.torch,
            flax=flax + rule.flax
            if isinstance(rule.flax, str)
            else tuple(flax + name for name in rule.flax),
            aliases=tuple(torch + alias for alias in rule.aliases),
        )
        for rule in rules
    )
