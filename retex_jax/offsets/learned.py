"""What learned generators are fitted to, and the state that they become (see `retex_jax.offsets.generator`)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.offsets import affine, exact, factorized, generator, shape_shared
from retex_jax.offsets.forms import (
    Affine,
    Elementwise,
    Factorized,
    Form,
    OwnForm,
    Product,
    Tied,
)
from retex_jax.offsets.generator import LearnedForm, Loss, Problem
from retex_jax.offsets.state import FitReport, LeafPlan, OffsetState
from retex_jax.typing import FlatParams, Params


def group_leaves(
    experts: ExpertSet, plans: Mapping[str, LeafPlan], form: LearnedForm
) -> list[list[str]]:
    """Leaves that are one stack; with "shape_shared" those that share one offset."""
    if form == "shape_shared":
        return shape_shared.shape_groups(experts, plans)
    keys = {
        name: (plans[name].solved_shape, plans[name].rank)
        if name in plans
        else experts.leaves[name].shape
        for name in experts.float_leaves
    }
    return tree.groups(keys, lambda key: len(keys))


def make_problem(
    experts: ExpertSet,
    base: FlatParams,
    plans: Mapping[str, LeafPlan],
    groups: list[list[str]],
    form: LearnedForm,
    loss: Loss,
    place: Callable[[str, jax.Array], jax.Array],
) -> Problem:
    """Reads all leaves; theta_0 only for the affine rule and the cosine.

    Args:
      experts: the experts.
      base: the merged model's leaves.
      plans: of every matrix leaf.
      groups: from `group_leaves`.
      form: what is learned.
      loss: of `generator.Objective`.
      place: ("target" or "direction", what was read of one leaf) to the same where it is to lie.

    Returns:
      The problem, float32.
    """
    needs_directions = form == "affine" or loss != "l2"
    targets, directions, counts = {}, {}, {}
    num_tasks = experts.num_tasks
    sums = np.zeros(num_tasks), np.zeros(num_tasks), np.zeros(1)
    for index, group in enumerate(groups):
        stack, lines = [], []
        for name in group:
            offsets = shape_shared.task_differences(experts, base, name, plans)
            sums[0][:] += _sums(offsets * offsets)
            stack.append(place("target", offsets))
            if needs_directions:
                line = _direction(experts, base, name, plans, form)
                sums[1][:] += _sums(offsets * line)
                sums[2][:] += _sums((line * line)[None])
                lines.append(place("direction", line))
        share = form == "shape_shared"
        targets[index] = _stacked(stack, share)
        if needs_directions:
            directions[index] = _stacked(lines, share)
        counts[index] = jnp.float32(len(group) if share else 1)
    energies, alignments, (direction_energy,) = (jnp.asarray(x, jnp.float32) for x in sums)
    return Problem(targets, directions, counts, energies, alignments, direction_energy)


def _stacked(leaves: list[jax.Array], share: bool) -> jax.Array:
    """[G, ...], or where the leaves share an offset their mean [1, ...]."""
    stack = jnp.stack(leaves)
    return stack.mean(axis=0, keepdims=True) if share else stack


def _sums(products: jax.Array) -> np.ndarray:
    """Of each task: [T, ...] to [T], float64."""
    return np.asarray(products, np.float64).reshape(len(products), -1).sum(axis=1)


def _direction(
    experts: ExpertSet,
    base: FlatParams,
    name: str,
    plans: Mapping[str, LeafPlan],
    form: LearnedForm,
) -> jax.Array:
    """M of one leaf as the offsets are seen: [a, b] or [*shape], float32."""
    if name in plans and form == "affine":
        return affine.directions(experts, base, name, plans[name])[1]
    difference = jnp.asarray(base[name], jnp.float32) - jnp.asarray(
        experts.pretrained(name), jnp.float32
    )
    if name not in plans:
        return difference
    matrix = jnp.asarray(tree.to_matrix(difference, plans[name].view))
    return matrix if plans[name].orientation == "right" else matrix.T


def to_state(
    experts: ExpertSet,
    merged: Params,
    plans: Mapping[str, LeafPlan],
    groups: list[list[str]],
    problem: Problem,
    params: dict[str, Any],
    form: LearnedForm,
    task_rank: int | None,
) -> OffsetState:
    """Stores what was learned, and measures it.

    Returns:
      The state; baked (one-hot embeddings) where that is smaller, and with "factorized" always.
    """
    base = tree.flatten(merged)
    offsets: dict[str, Form] = {}
    report = FitReport({}, {}, {}, {})
    ones = jnp.ones((experts.num_tasks, 1))
    embeddings = jnp.concatenate([params["embeddings"], ones], axis=1)
    bake = form == "factorized" or experts.num_tasks <= embeddings.shape[1]
    for index, group in enumerate(groups):
        learned = params["groups"][index]
        layers = {
            prefix: _layer(learned, prefix, embeddings if bake else None)
            for prefix in ("", "inner_", "gamma_")
            if prefix + "weight" in learned
        }
        if "gamma_" in layers:  # gamma - 1; the constant's entry of an embedding is the last
            entries = slice(None) if bake else slice(-1, None)
            layers["gamma_"] = layers["gamma_"].at[:, entries].add(-1)
        owners = group[:1] if form == "shape_shared" else group
        for position, name in enumerate(owners):
            parts = {prefix: layer[position] for prefix, layer in layers.items()}
            plan, shared = plans.get(name), learned["shared"][position]
            direction = (
                affine.directions(experts, base, name, plan)[0]
                if plan is not None and "gamma_" in parts
                else None
            )
            offsets[name] = _form(parts, shared, plan, direction)
        offsets |= {name: Tied(group[0]) for name in group[len(owners) :]}
        _measure(report, experts, base, plans, group, index, problem, params, form, task_rank)
    return OffsetState(
        merged=merged,
        task_embeddings=jnp.eye(experts.num_tasks) if bake else embeddings,
        offsets=dict(sorted(offsets.items())),
        report=report,
        layout=experts.layout,
    )


def _layer(group: dict[str, jax.Array], prefix: str, embeddings: jax.Array | None) -> jax.Array:
    """Weight and bias as one generator [G, K, ...]; [G, T, ...] for given embeddings [T, K]."""
    weight, bias = group[prefix + "weight"], group[prefix + "bias"]
    layer = jnp.concatenate([weight, bias[:, None]], axis=1)
    if embeddings is None:
        return layer
    return jnp.einsum("tk,gk...->gt...", embeddings, layer, precision="highest")


def _form(
    parts: dict[str, jax.Array],
    shared: jax.Array,
    plan: LeafPlan | None,
    direction: jax.Array | None,
) -> OwnForm:
    if plan is None:
        return Elementwise(parts[""], shared)
    if "inner_" in parts:
        return Factorized(parts[""], parts["inner_"], shared, plan.orientation)
    if direction is not None:
        return Affine(parts[""], shared, parts["gamma_"], direction, plan.orientation)
    return Product(parts[""], shared, plan.orientation)


def _measure(
    report: FitReport,
    experts: ExpertSet,
    base: FlatParams,
    plans: Mapping[str, LeafPlan],
    group: list[str],
    index: int,
    problem: Problem,
    params: dict[str, Any],
    form: LearnedForm,
    task_rank: int | None,
) -> None:
    targets, embeddings = problem.targets[index], params["embeddings"]
    found = generator.predict(params, index, embeddings, problem.directions.get(index))
    residual = jnp.sum((found - targets) ** 2, axis=tuple(range(1, found.ndim)))
    plan = plans.get(group[0])
    if form == "shape_shared":
        mean = shape_shared.leaf_mean(experts, base, group, plans)
        least = 0.0 if plan is None else float(exact.solve_group(targets, plan.rank).optimum[0])
        stored = np.asarray(found[0], np.float64)
        shape_shared.add_to_report(report, experts, base, group, plans, mean, stored, least)
        return
    if plan is None:
        for position, name in enumerate(group):
            report.residuals[name] = float(residual[position])
            report.optima[name] = 0.0
            report.energies[name] = float(jnp.sum(targets[position] ** 2))
        return
    solution = exact.solve_group(targets, plan.rank)
    exact.add_to_report(report, group, solution._replace(residual=residual))
    for position, name in enumerate(group):
        if form == "affine":
            report.optima[name] = float("nan")
        elif generator.has_inner(form, plan.rank, task_rank) and task_rank is not None:
            report.optima[name] = factorized.lower_bound(
                targets[position], task_rank, report.optima[name]
            )
