"""ReTeX-S: one generator and one shared factor for all leaves of a shape (arXiv:2606.26902, C.6).

The offset of a task is then the same for all L leaves of a shape, G_t S for D_t1, ..., D_tL, and the squared
error is L sum_t ||mean_l D_tl - G_t S||^2 + sum_t,l ||D_tl - mean_l D_tl||^2: its optimum is the closed form of
the leaf-means, [mean_l D_1l; ...; mean_l D_Tl]. Leaves below two axes are shared as well, which recovers their
means only; a shape that one leaf has is ReTeX's own. "Shape" is that of the leaf as a matrix (a, b), so that
both layouts share alike. All sums are float64; factors are float32, stored with the first leaf of a shape.
"""

from collections.abc import Hashable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.offsets import differences, exact
from retex_jax.offsets.forms import Form, Product, Tied
from retex_jax.offsets.state import FitReport, LeafPlan, OffsetState
from retex_jax.typing import FlatParams, Params, ProgressFn


def shape_groups(experts: ExpertSet, plans: Mapping[str, LeafPlan]) -> list[list[str]]:
    """The leaves of each shape, (a, b) or, below two axes, their own; the first stores the offset."""
    keys: dict[str, Hashable] = {
        name: (plans[name].shape, plans[name].rank, plans[name].orientation)
        if name in plans
        else experts.leaves[name].shape
        for name in experts.float_leaves
    }
    return tree.groups(keys, lambda key: len(keys))


def task_differences(
    experts: ExpertSet, base: FlatParams, name: str, plans: Mapping[str, LeafPlan]
) -> jax.Array:
    """D_t of one leaf: [T, a, b] as the solver sees it, or [T, *shape] below two axes, float32."""
    if name in plans:
        return differences.matrices(experts, base, name, plans[name])
    return differences.vectors(experts, base, name)


def leaf_mean(
    experts: ExpertSet, base: FlatParams, group: list[str], plans: Mapping[str, LeafPlan]
) -> np.ndarray:
    """mean_l D_tl of the leaves of a shape, read one at a time: [T, a, b] or [T, *shape], float64."""
    total = np.zeros(())
    for name in group:
        total = total + np.asarray(task_differences(experts, base, name, plans), np.float64)
    return total / len(group)


def add_to_report(
    report: FitReport,
    experts: ExpertSet,
    base: FlatParams,
    group: list[str],
    plans: Mapping[str, LeafPlan],
    mean: np.ndarray,
    shared_offsets: np.ndarray,
    least: float,
) -> None:
    """Enters the certificate of the leaves of a shape into `report`; reads them once more.

    Args:
      report: receives residuals, optima and energies. A leaf's optimum is its part of the shape's: the
        distance of its offsets from the means, and the least distance of the means from an offset. Only their
        sum over the shape is a bound.
      experts: the experts.
      base: the merged leaves.
      group: the leaves of a shape.
      plans: of every matrix leaf.
      mean: of their offsets, [T, ...], float64.
      shared_offsets: what is stored, like `mean`.
      least: the least possible sum of ||mean - G_t S||^2.
    """
    for name in group:
        offsets = np.asarray(task_differences(experts, base, name, plans), np.float64)
        report.residuals[name] = float(np.sum((offsets - shared_offsets) ** 2))
        report.optima[name] = float(np.sum((offsets - mean) ** 2)) + least
        report.energies[name] = float(np.sum(offsets**2))


def fit(
    experts: ExpertSet,
    merged: Params,
    plans: Mapping[str, LeafPlan],
    *,
    progress: ProgressFn | None = None,
) -> OffsetState:
    """Solves every shape; its leaves are read one at a time, twice.

    Args:
      experts: the experts.
      merged: the base that offsets are added to.
      plans: of every matrix leaf.
      progress: called with (shapes done, shapes).

    Returns:
      The state, in the baked form: each shape's first leaf has the offset, the others are `Tied` to it. The
      report's optimum is that of this form; a spectrum is that of the leaf-means, under the first leaf's name.
    """
    base = tree.flatten(merged)
    offsets: dict[str, Form] = {}
    report = FitReport({}, {}, {}, {})
    groups = shape_groups(experts, plans)
    for done, group in enumerate(groups, start=1):
        owner = group[0]
        mean = leaf_mean(experts, base, group, plans)
        stored = jnp.asarray(mean, jnp.float32)
        if owner in plans:
            with jax.enable_x64(True):
                solution = exact.solve_group(jnp.asarray(mean)[None], plans[owner].rank)
            factors, shared = solution.task_factors[0], solution.shared_factor[0]
            offsets[owner] = Product(factors, shared, plans[owner].orientation)
            report.spectra[owner] = np.asarray(solution.spectrum[0])
            product = np.asarray(factors, np.float64) @ np.asarray(shared, np.float64)
            least = float(solution.optimum[0])
        else:
            offsets[owner] = differences.elementwise(stored)
            product, least = np.asarray(stored, np.float64), 0.0
        offsets |= {name: Tied(owner) for name in group[1:]}
        add_to_report(report, experts, base, group, plans, mean, product, least)
        if progress:
            progress(done, len(groups))
    return OffsetState.baked(merged, offsets, report, experts.num_tasks, experts.layout)
