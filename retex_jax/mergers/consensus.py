"""Consensus Task Arithmetic (arXiv:2405.07813), and the TALL masks that it counts.

The mask of task t keeps the entries of the multi-task vector that bring theta_0 nearer to
the expert: m_t = |tau_t| > lambda_t |tau_MT - tau_t|, with tau_MT = sum_t tau_t. Consensus TA keeps the
entries that at least k tasks keep, and drops those that none ("catastrophic") or, at k = 2, only one
("selfish") does: theta_0 + alpha * [sum_t m_t >= k] * tau_MT.

What others say, and do otherwise:
- The comparison is strict, as in the authors' code. Equality matters only where tau_MT - tau_t and tau_t
  are both 0, and tau_MT with them, or at an exact tie.
- fusion_bench passes task vectors where its function expects experts, and so compares
  |theta_0 - tau_t|, which keeps nearly everything (.98 of a test model against .36 at lambda = 0.6).
- ReTeX's appendix says that the masks multiply single task vectors; in the paper and in its code they
  multiply tau_MT.
- The authors' script writes the masks with np.save, reads them with torch.load, and does not trim the
  bits that np.unpackbits adds, so their Consensus from disk does not run as committed.

lambda_t (0.2 to 0.6, one a task) and alpha are chosen on labelled validation data. Float32.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax.experts import ExpertSet
from retex_jax.mergers.leafwise import check_finite_number, merge_leaves, sum_over_tasks
from retex_jax.typing import Params


@jax.jit
def tall_masks(
    task_vectors: jax.Array, multi_task_vector: jax.Array, mask_lambdas: jax.Array
) -> jax.Array:
    """m_t = |tau_t| > lambda_t |tau_MT - tau_t|.

    Args:
      task_vectors: tau_t, [T, *shape], float32.
      multi_task_vector: tau_MT, [*shape], float32.
      mask_lambdas: lambda_t, [T], float32.

    Returns:
      [T, *shape], bool.
    """
    limits = mask_lambdas.reshape(-1, *[1] * multi_task_vector.ndim)
    return jnp.abs(task_vectors) > limits * jnp.abs(multi_task_vector - task_vectors)


@jax.jit
def consensus_leaf(task_vectors: jax.Array, mask_lambdas: jax.Array, k: int) -> jax.Array:
    """The multi-task vector where at least `k` tasks keep it, 0 elsewhere.

    Args:
      task_vectors: tau_t, [T, *shape], float32.
      mask_lambdas: lambda_t, [T], float32.
      k: least number of tasks.

    Returns:
      [*shape], float32.
    """
    multi_task_vector = sum_over_tasks(task_vectors)
    masks = tall_masks(task_vectors, multi_task_vector, mask_lambdas)
    return jnp.where(sum_over_tasks(masks.astype(jnp.int32)) >= k, multi_task_vector, 0.0)


def per_task(name: str, value: float | Sequence[float], num_tasks: int) -> jax.Array:
    """One number for all tasks, or one a task, as [T], float32.

    Raises:
      ValueError: unless it is one number or T of them, all finite and >= 0.
    """
    numbers = np.asarray(value, np.float32)
    if numbers.shape not in ((), (num_tasks,)) or not np.all((numbers >= 0) & np.isfinite(numbers)):
        raise ValueError(f"{name}: got {value!r}, expected a number >= 0 or {num_tasks} of them")
    return jnp.asarray(np.broadcast_to(numbers, num_tasks))


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    mask_lambda: float | Sequence[float] = 0.4,
    k: int = 2,
    scaling: float = 0.3,
) -> Params:
    """Merges by Consensus Task Arithmetic.

    Args:
      experts: the experts.
      key: not used; every method takes one.
      mask_lambda: lambda_t, one number or T of them, >= 0; larger keeps less. The paper picks each
        from 0.2 to 0.6 on validation data; 0.4 is the middle of its grid.
      k: least number of tasks whose masks keep an entry, 0 to T. 0 is Task Arithmetic; the paper's 2
        needs two tasks.
      scaling: alpha on what is kept.

    Returns:
      The merged model.

    Raises:
      ValueError: if `mask_lambda` is not one number or T of them, finite and >= 0, `k` is not an
        integer from 0 to T, or `scaling` is not finite.
    """
    del key
    lambdas = per_task("mask_lambda", mask_lambda, experts.num_tasks)
    is_integer = isinstance(k, int | np.integer) and not isinstance(k, bool)
    if not is_integer or not 0 <= k <= experts.num_tasks:
        raise ValueError(f"k: got {k!r}, expected an integer from 0 to T = {experts.num_tasks}")
    check_finite_number("scaling", scaling)

    def merge_leaf(name: str) -> jax.Array:
        kept = consensus_leaf(experts.task_vectors(name), lambdas, k)
        return jnp.asarray(experts.pretrained(name), dtype=jnp.float32) + scaling * kept

    return merge_leaves(experts, merge_leaf)
