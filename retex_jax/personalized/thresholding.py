"""DTS' thresholding: four groups of values, two bits an element, one magnitude a group.

DTS ("Stay Unique, Stay Efficient: Preserving Model Personality in Multi-Task Merging", section 3.2 and
appendix A, Eqs. 3-6 and 10-13): values are grouped by sign and, within a sign, by whether they exceed that
sign's median magnitude; a group is replaced by its sign times one magnitude. Where the equations fail they
are corrected:

- Eqs. 12 and 13 mask the negative groups with g, the indicator of positive values, and would leave them
  empty; meant is 1 - g.
- Eq. 13 adds the negative groups; meant is a minus sign, as magnitudes are norms.
- Eq. 11's g^- marks the *small* negatives (lambda_2 < x < 0), while g^+ marks the large positives. Here "large"
  means the same for both signs (section 3.2: "the same strategy is applied to the negative values"): a magnitude
  strictly above the median. Only the value that is itself the median is treated otherwise by Eq. 11.
- Zeros: Eq. 3 makes them negative, and Eq. 11 then puts them among the *large* negatives. Here a zero is a
  small negative: it counts in that group's magnitude and is restored as that group is, but it has no part in the
  median, which is of the negative values. Values that are all zero are restored as zeros.

Section 3.2 speaks of four groups within each singular vector, appendix A counts eight magnitudes for a whole
U and V; so the sets of values are rows here, and the caller decides what a row is. The paper stores three masks an
element (g, g^+, g^-) where two bits tell four groups apart. Grouping is exact, in float64 on the host:
a median is a partition there, and XLA's sort is slow.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Scale = Literal["rms", "mean", "none"]
Levels = Literal[1, 2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Thresholded values of T tasks: rows of n values, each row with its own four groups.

    Attributes:
      planes: two bit planes of the flattened rows (positive; large), packed along the last axis,
        [T, 2, ceil(rows * n / 8)], uint8; of one level only the first, [T, 1, ...].
      magnitudes: >= 0, [T, rows, 4], float32; group = 2 * positive + large.
    """

    planes: jax.Array
    magnitudes: jax.Array


def threshold(
    values: np.ndarray, scale: Scale, levels: Levels = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Groups the values of each row (Eqs. 3, 4, 10 and 11) and measures each group (Eqs. 6 and 12).

    Args:
      values: [rows, n], float64.
      scale: "rms", the paper's: norm of the group / square root of its size, which keeps the group's
        norm; "mean": of the magnitudes, which is nearest to the values in the L2 norm; "none": 1, the paper's
        ablation (table 12).
      levels: magnitudes a sign: 2, or 1, which the paper calls binarisation (table 12).

    Returns:
      Bits (positive; large), [levels, rows, n], bool, and magnitudes, [rows, 4], float64; an empty group's is 0.
    """
    positive = values > 0
    large = np.empty_like(positive)
    magnitudes = np.zeros((len(values), 4))
    for row, row_values in enumerate(values):
        for sign, members in enumerate((~positive[row], positive[row])):
            sizes = np.abs(row_values[members])
            is_large = sizes > (_median(sizes) if levels == 2 else np.inf)
            large[row, members] = is_large
            for size, group in enumerate((~is_large, is_large)):
                if group.any():
                    magnitudes[row, 2 * sign + size] = _magnitude(sizes[group], scale)
    return np.stack([positive, large][:levels]), magnitudes


def _median(sizes: np.ndarray) -> float:
    """Of those above 0; without any, all are small."""
    above = sizes[sizes > 0]
    return float(np.median(above, overwrite_input=True)) if above.size else np.inf


def _magnitude(group: np.ndarray, scale: Scale) -> float:
    if scale == "none":
        return float(group.any())
    return float(np.mean(group**2) ** 0.5 if scale == "rms" else np.mean(group))


def pack(bits: np.ndarray, magnitudes: np.ndarray) -> Groups:
    """Packs the result of `threshold`: bits [levels, rows, n], magnitudes [rows, 4], of one task (no axis T)."""
    flat = jnp.asarray(bits.reshape(len(bits), -1))
    return Groups(jnp.packbits(flat, axis=-1), jnp.asarray(magnitudes, jnp.float32))


def restore(groups: Groups, task: int | jax.Array, size: int) -> jax.Array:
    """Restores the values of one task (Eqs. 5 and 13).

    Args:
      groups: from `pack`.
      task: task id; may be traced.
      size: n.

    Returns:
      [rows, n], float32.
    """
    magnitudes = groups.magnitudes[task]
    rows = magnitudes.shape[0]
    bits = jnp.unpackbits(groups.planes[task], axis=-1, count=rows * size)
    positive, *larger = bits.reshape(len(bits), rows, size).astype(bool)
    large = larger[0] if larger else jnp.zeros_like(positive)
    negatives = -jnp.where(large, magnitudes[:, 1:2], magnitudes[:, 0:1])
    positives = jnp.where(large, magnitudes[:, 3:4], magnitudes[:, 2:3])
    return jnp.where(positive, positives, negatives)
