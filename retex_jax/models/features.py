"""What every backbone returns: one pooled vector and one mean vector a block."""

from typing import NamedTuple

import jax


class Features(NamedTuple):
    """Features of one batch.

    Attributes:
      pooled: [B, d], float32: the vector that a classification head reads, or None when the forward
        pass stopped before the last block.
      layers: [num_layers, B, d], float32: `layers[i]` is the mean over (unpadded) tokens of the
        hidden state after block i. A task identifier reads these.
    """

    pooled: jax.Array | None
    layers: jax.Array
