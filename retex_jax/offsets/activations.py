"""Activation-aware fits: the error of a leaf is that of what its layer gives for unlabelled inputs.

A kernel that is off by E changes what its layer gives by E x, of mean square ||E C^(1/2)||^2 over inputs x with
the second moment C = mean of x x^T. The exact solver then minimises sum_t w_t^2 ||(D_t - G_t S) L||^2 with
C = L L^T; the norm is the same for every such L, of which the Cholesky factor is the cheapest. In whitened
coordinates, D_t L, that is the problem of `retex_jax.offsets.exact`; on the side of the inputs the solution's
factor is then multiplied by L^-1. Where S stands on the left it is on the side of the outputs, and
G_t = D_t^T S^T whatever C is.

C is the mean over tasks of the second moments of what the merged model's layers read. It is scaled to a mean
eigenvalue of 1, so that errors stay comparable between leaves, those without C among them (embeddings, and
whatever else `Calibration.linear_inputs` does not name), and shrunk towards the identity, (1 - s) C + s I:
at s = 1 the metric is plain L2. A layer whose inputs are all zero keeps plain L2.

Numerics: products of inputs in float32; sums over tasks, L and residuals in float64; whitened offsets in float32.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.calibration import Calibration, require_linear_inputs, second_moments
from retex_jax.offsets.coding import Stored, dense
from retex_jax.offsets.forms import Orientation
from retex_jax.offsets.state import LeafPlan
from retex_jax.typing import Array, Params

NAME = "retex with a shrinkage below 1"


def roots(
    calibration: Calibration, merged: Params, plans: Mapping[str, LeafPlan], shrinkage: float
) -> dict[str, np.ndarray]:
    """Measures what the merged model's layers read.

    Args:
      calibration: inputs of every task, and `linear_inputs`; what it names beside the planned leaves is ignored.
      merged: the base that offsets are added to.
      plans: of every matrix leaf.
      shrinkage: s, above 0, at most 1.

    Returns:
      L by leaf, [b, b], lower triangular, float32, with rows in the order of the matrix view's columns: 4 b^2
      bytes a leaf; 20 b^2 are needed while they are made.

    Raises:
      ValueError: if the calibration has no `linear_inputs`, or these name none of the leaves, do not fit them or
        are not finite.
    """
    linear_inputs = require_linear_inputs(calibration, NAME)
    params = jax.tree.map(jnp.asarray, merged)
    shapes = {name: leaf.shape for name, leaf in tree.flatten(params).items()}
    specs = jax.eval_shape(linear_inputs, params, next(iter(calibration.batches[0])))
    names = [name for name in plans if name in specs]
    problems = [
        f"calibration.linear_inputs: {name} of shape {shapes[name]} has inputs of shape "
        f"{specs[name].shape}, expected [N, {plans[name].shape[1]}]"
        for name in names
        if specs[name].shape[1:] != plans[name].shape[1:]
    ]
    if not names:
        problems = [
            f"calibration.linear_inputs: got {sorted(specs)}, none of which is a matrix leaf of the experts"
        ]
    if problems:
        raise ValueError("\n".join(problems))
    moments_of = second_moments(linear_inputs, names)
    sums = {name: np.zeros((plans[name].shape[1],) * 2) for name in names}
    for batches in calibration.batches:
        for name, moment in moments_of("the merged model", params, batches):
            sums[name] += moment
    result = {}
    for name in names:
        total = sums.pop(name)
        if np.trace(total) > 0:
            order = view_order(plans[name].view, shapes[name])
            result[name] = root(total[np.ix_(order, order)], shrinkage)
    return result


def root(moment: np.ndarray, shrinkage: float) -> np.ndarray:
    """The Cholesky factor L of a second moment that is scaled and shrunk.

    Args:
      moment: [b, b], float64, of positive trace.
      shrinkage: s, above 0, at most 1.

    Returns:
      L of L L^T = (1 - s) C + s I, [b, b], lower triangular, float32.
    """
    scaled = (1 - shrinkage) * len(moment) / np.trace(moment) * moment
    return np.linalg.cholesky(scaled + shrinkage * np.eye(len(moment))).astype(np.float32)


def view_order(view: tree.MatrixView, shape: tuple[int, ...]) -> np.ndarray:
    """Where the matrix view's columns lie in a layer's flattened input, whose axes are in the leaf's order: [b]."""
    axes = sorted(view.input_axes)
    positions = np.arange(np.prod([shape[axis] for axis in axes])).reshape(
        [shape[axis] for axis in axes]
    )
    return positions.transpose([axes.index(axis) for axis in view.input_axes]).ravel()


def stack_roots(roots: Mapping[str, Array], names: Sequence[str]) -> jax.Array | None:
    """L of a group of leaves, [G, b, b]; None where its first leaf has none."""
    if names[0] not in roots:
        return None
    return jnp.stack([jnp.asarray(roots[name]) for name in names])


def whiten(offsets: Array, root: Array | None, orientation: Orientation) -> jax.Array:
    """Offsets whose plain squares are those of the metric.

    Args:
      offsets: D_t, [*batch, T, a, b]; for "left" transposed, [*batch, T, b, a].
      root: L, [*batch, b, b]; None gives the offsets.
      orientation: "right" where the inputs are columns, "left" where they are rows.

    Returns:
      D_t L; for "left" L^T D_t^T.
    """
    if root is None:
        return jnp.asarray(offsets)
    root = jnp.expand_dims(root, -3)
    if orientation == "right":
        return jnp.matmul(offsets, root, precision="highest")
    return jnp.matmul(root.swapaxes(-1, -2), offsets, precision="highest")


def unwhiten(rows: Array, root: Array) -> jax.Array:
    """Undoes `whiten` for a factor on the side of the inputs.

    Args:
      rows: [*batch, r, b].
      root: L, [*batch, b, b].

    Returns:
      rows L^-1.
    """
    solve = jax.scipy.linalg.solve_triangular
    return solve(jnp.asarray(root), rows.swapaxes(-1, -2), trans="T", lower=True).swapaxes(-1, -2)


def residuals(
    offsets: Array,
    task_factors: Stored,
    shared: Stored,
    root: Array,
    orientation: Orientation,
    task_weights: Array,
) -> jax.Array:
    """The weighted squared errors, in the metric, of factors as they are stored.

    Args:
      offsets: as `whiten` takes them, of G leaves.
      task_factors: G_t, [G, T, a, r].
      shared: S, [G, r, b].
      root: L, [G, b, b].
      orientation: of `whiten`.
      task_weights: [T].

    Returns:
      [G], float64.
    """
    with jax.enable_x64(True):
        double = [
            jnp.asarray(array, jnp.float64)
            for array in (offsets, dense(task_factors), dense(shared), root, task_weights)
        ]
        return _residuals(*double, orientation)


@jax.jit(static_argnames="orientation")
def _residuals(
    offsets: jax.Array,
    task_factors: jax.Array,
    shared: jax.Array,
    root: jax.Array,
    task_weights: jax.Array,
    orientation: Orientation,
) -> jax.Array:
    errors = offsets - jnp.matmul(task_factors, shared[:, None], precision="highest")
    errors = whiten(errors, root, orientation) * task_weights[:, None, None]
    return jnp.sum(errors**2, axis=(1, 2, 3))
