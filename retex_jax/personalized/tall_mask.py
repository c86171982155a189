"""TALL-mask (arXiv:2405.07813): each task's expert is a masked multi-task vector.

Expert t is theta_0 + m_t * tau_MT, with tau_MT = sum_t tau_t and m_t = |tau_t| > lambda_t |tau_MT - tau_t|.
What is stored beside theta_0 is tau_MT once, and one bit an entry and task. The masks, and what others say
about them, are in `retex_jax.mergers.consensus`. The paper reports 1/T + 1/32 of a 32-bit model a task.

lambda_t is chosen for each task on labelled validation data from 0.2, 0.3, ..., 0.6; a task's mask does
not depend on the others' lambda. The authors recover with coefficient 1; another coefficient scales tau_MT,
in the masks as well, which makes them those of theta_0 + coefficient * sum tau_t. They also offer TIES'
task vector as tau_MT, which is not done here. Float32; tau_MT is stored in the leaf's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.mergers.consensus import per_task, tall_masks
from retex_jax.mergers.leafwise import check_finite_number, sum_over_tasks
from retex_jax.personalized import changes, masks
from retex_jax.typing import FlatParams, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TallMaskState:
    """The pretrained model, and what is stored beside it.

    Attributes:
      pretrained: nested dict, theta_0.
      multi_task_vector: tau_MT, by float leaf: [*shape], the leaf's dtype.
      masks: by float leaf: [T, ceil(size / 8)], uint8.
    """

    pretrained: Params
    multi_task_vector: FlatParams
    masks: FlatParams

    @property
    def num_tasks(self) -> int:
        """T."""
        return next(iter(self.masks.values())).shape[0]


@jax.jit
def _fit_leaf(
    task_vectors: jax.Array, lambdas: jax.Array, coefficient: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    multi_task_vector = coefficient * sum_over_tasks(task_vectors)
    return multi_task_vector, masks.pack(tall_masks(task_vectors, multi_task_vector, lambdas))


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    mask_lambda: float | Sequence[float] = 0.4,
    coefficient: float = 1.0,
) -> TallMaskState:
    """Builds the multi-task vector and the masks.

    Args:
      experts: the experts.
      key: not used; every method takes one.
      mask_lambda: lambda_t, one number or T of them, >= 0; larger keeps less. 0.4 is the middle of the
        paper's grid.
      coefficient: of the sum of task vectors, in tau_MT.

    Returns:
      The state.

    Raises:
      ValueError: if `mask_lambda` is not one number or T of them, finite and >= 0, or `coefficient` is
        not finite.
    """
    del key
    lambdas = per_task("mask_lambda", mask_lambda, experts.num_tasks)
    check_finite_number("coefficient", coefficient)
    pretrained = changes.stored_pretrained(experts)
    flat = tree.flatten(pretrained)
    multi_task_vector, packed = {}, {}
    for name in experts.float_leaves:
        vector, packed[name] = _fit_leaf(experts.task_vectors(name), lambdas, coefficient)
        multi_task_vector[name] = changes.stored(vector, flat[name])
    return TallMaskState(pretrained, multi_task_vector, packed)


@jax.jit
def _change(multi_task_vector: jax.Array, packed: jax.Array, task: int | jax.Array) -> jax.Array:
    mask = masks.unpack(packed[task], multi_task_vector.shape)
    return jnp.where(mask, multi_task_vector.astype(jnp.float32), 0.0)


def recover(state: TallMaskState, task: int | jax.Array) -> Params:
    """theta_0 + m_t * tau_MT.

    Args:
      state: from `fit`.
      task: task id, 0 to T - 1; may be traced, and is then not checked.

    Returns:
      Nested dict like the pretrained model.

    Raises:
      ValueError: if `task` is out of range.
    """
    changes.check_task(task, state.num_tasks)

    def change(name: str, _: tuple[int, ...]) -> jax.Array:
        return _change(state.multi_task_vector[name], state.masks[name], task)

    return changes.add_changes(state.pretrained, change)


def extra_bytes(state: TallMaskState) -> int:
    """Bytes beside the pretrained model, for all tasks: the multi-task vector and the masks."""
    return tree.param_bytes((state.multi_task_vector, state.masks))


def paper_amr(state: TallMaskState) -> float:
    """The papers' additional memory a task, of a 32-bit model: 1/T + 1/32."""
    return 1 / state.num_tasks + 1 / 32
