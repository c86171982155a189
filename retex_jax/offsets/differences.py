"""What offsets are fitted to: the experts' differences from the merged model, one leaf at a time.

Leaves below two axes have no factors: each task's own difference is its offset.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.buffers import aligned_empty
from retex_jax.experts import ExpertSet
from retex_jax.offsets.coding import code, dense
from retex_jax.offsets.forms import Elementwise, Form, Orientation
from retex_jax.offsets.state import FitReport, LeafPlan
from retex_jax.typing import FlatParams


def elementwise(own: jax.Array, bits: int = 32) -> Elementwise:
    """The offset of a leaf below two axes: [T, *shape], float32, one scale a task where it is coded."""
    axes = tuple(range(1, own.ndim))
    return Elementwise(code(own, bits, axes) if axes else own, jnp.ones((), jnp.float32))


def add_vectors(
    experts: ExpertSet,
    base: FlatParams,
    plans: Mapping[str, LeafPlan],
    offsets: dict[str, Form],
    report: FitReport,
    task_weights: jax.Array | None = None,
    bits: int = 32,
) -> None:
    """Enters the leaves below two axes, each task's own offset, into `offsets` and `report`."""
    weights = jnp.ones(experts.num_tasks) if task_weights is None else task_weights
    for name in experts.float_leaves:
        if name not in plans:
            own = vectors(experts, base, name)
            offsets[name] = form = elementwise(own, bits)
            scales = weights.reshape(-1, *[1] * (own.ndim - 1))
            error = scales * (dense(form.generator) - own)
            report.energies[name] = float(jnp.sum((scales * own) ** 2))
            report.residuals[name], report.optima[name] = float(jnp.sum(error**2)), 0.0


def vectors(experts: ExpertSet, base: FlatParams, name: str) -> jax.Array:
    """d_t = theta_t - theta_merge of one leaf: [T, *shape], float32."""
    parts = experts.parts(name)
    if None in parts:
        return _whole(experts, base, name)
    shape = experts.leaves[name].shape
    merged = np.asarray(base[name]).reshape(-1)
    differences = aligned_empty([experts.num_tasks, merged.size], np.float32)
    for part in parts:
        np.subtract(
            experts.stacked(name, part), merged[part], out=differences[:, part], casting="unsafe"
        )
    differences = differences.reshape(experts.num_tasks, *shape)
    return jnp.asarray(jax.device_put(differences, may_alias=True))


def _whole(experts: ExpertSet, base: FlatParams, name: str) -> jax.Array:
    """As `vectors`, of leaves that are read whole: one expert's at a time where they are in host memory."""
    first = experts.expert(name, 0)
    if isinstance(first, jax.Array):
        return jnp.asarray(experts.stacked(name)) - jnp.asarray(base[name], dtype=jnp.float32)
    merged = np.asarray(base[name])
    differences = aligned_empty([experts.num_tasks, *first.shape], np.float32)
    for task in range(experts.num_tasks):
        leaf, row = experts.expert(name, task) if task else first, differences[task, ...]
        np.subtract(leaf, merged, out=row, dtype=np.float32, casting="unsafe")
    return jnp.asarray(jax.device_put(differences, may_alias=True))


def matrices(experts: ExpertSet, base: FlatParams, name: str, plan: LeafPlan) -> jax.Array:
    """D_t of one leaf, as matrices: [T, a, b], float32; transposed where S stands on the left."""
    values, (rows, columns) = vectors(experts, base, name), plan.view
    axes = (*rows, *columns) if plan.orientation == "right" else (*columns, *rows)
    is_matrix = axes == (0, 1)
    return values if is_matrix else _oriented(values, plan.view, plan.orientation)


@partial(jax.jit, static_argnames=("view", "orientation"))
def _oriented(values: jax.Array, view: tree.MatrixView, orientation: Orientation) -> jax.Array:
    seen = tree.to_matrix(values, view)
    return jnp.asarray(seen if orientation == "right" else seen.swapaxes(-1, -2))
