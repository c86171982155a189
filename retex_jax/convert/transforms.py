"""Rearrangements of arrays between torch and Flax layouts, each with the one that undoes it.

They only move elements: the dtype stays, and undoing one gives back every bit.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """A rearrangement of one torch array, and the one that undoes it.

    Attributes:
      name: for error messages.
      ndim: number of axes of the torch array, or None for any.
      forward: from the torch layout to the Flax layout; a tuple of arrays where one torch array
        holds several parameters, else one array.
      inverse: from the Flax layout, one argument a parameter, to the torch layout.
    """

    name: str
    ndim: int | None
    forward: Callable[[np.ndarray], np.ndarray | tuple[np.ndarray, ...]]
    inverse: Callable[..., np.ndarray]


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


def split(parts: int, axis: int, then: Transform = IDENTITY) -> Transform:
    """Returns the transform that takes a fused torch array apart, for a rule with a tuple of names.

    Args:
      parts: how many parts of equal size there are.
      axis: the axis of the torch array along which they lie one after another.
      then: what is done with each part.

    Returns:
      The transform; its forward raises ValueError where the axis is missing or does not divide.
    """

    def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"no axis {axis}")
        return tuple(then.forward(part) for part in np.split(x, parts, axis))

    def inverse(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate([then.inverse(x) for x in arrays], axis)

    name = f"split_{parts}" if then.name == "identity" else f"split_{parts}_{then.name}"
    return Transform(name, then.ndim, forward, inverse)
