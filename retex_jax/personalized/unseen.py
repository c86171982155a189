"""Weights of seen tasks for an unseen one, for the `mix` of any method that has one.

DTS ("Stay Unique, Stay Efficient: Preserving Model Personality in Multi-Task Merging", section 3.3, Eq. 8;
Table 6 has other methods). Needs text embeddings of the tasks' class names or descriptions, no data.
"""

import numpy as np

from retex_jax.typing import Array


def similarity_weights(unseen: Array, seen: Array) -> np.ndarray:
    """Weights for an unseen task by the cosine of task embeddings (Eq. 8), which the caller makes.

    Args:
      unseen: E_u, [d]: the mean text embedding of the task's class names or its description.
      seen: E_n, [T, d].

    Returns:
      gamma, [T], float32: cosines over their sum, negative ones taken as 0.

    Raises:
      ValueError: if the shapes do not fit, a vector is 0 or not finite, or no cosine is positive.
    """
    unseen, seen = np.asarray(unseen, np.float64), np.asarray(seen, np.float64)
    if seen.ndim != 2 or not seen.size or unseen.shape != seen.shape[1:]:
        raise ValueError(f"unseen, seen: got {unseen.shape}, {seen.shape}, expected [d], [T, d]")
    norms = np.linalg.norm(seen, axis=1) * np.linalg.norm(unseen)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise ValueError("unseen, seen: got a vector that is 0 or not finite")
    cosines = np.maximum(seen @ unseen / norms, 0)
    if not cosines.any():
        raise ValueError("seen: no embedding has a positive cosine with that of the unseen task")
    return (cosines / cosines.sum()).astype(np.float32)
