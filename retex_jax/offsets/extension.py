"""Adding a task to fitted offsets, and removing one, without the other experts.

The merged model and all that older tasks store stay as they are, to the last bit. A new task's offset is
first projected on each leaf's shared factor, which costs it the task factor only; what is left gets low-rank
products of its own, whose ranks are chosen by a budget of bytes (`retex_jax.offsets.budget`). So the merged
model is not that of all tasks together, and neither is the shared factor: fitting again with all experts
costs their presence, and is the better the more tasks were added.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import tree
from retex_jax.offsets import budget as budgets
from retex_jax.offsets import separate
from retex_jax.offsets.coding import Stored, code_factors, coded_bytes, dense, take
from retex_jax.offsets.differences import elementwise
from retex_jax.offsets.forms import Elementwise, Extended, Form, OwnForm, Product, Separate, Tied
from retex_jax.offsets.state import LeafPlan, OffsetState, plan_leaves
from retex_jax.typing import Params


def add_task(
    state: OffsetState,
    expert: Params,
    *,
    budget: float,
    bits: int = 32,
    vector_bits: int = 32,
    project: bool = True,
) -> OffsetState:
    """Adds one expert to a state; its task id is the last.

    Args:
      state: from `fit`, in the baked form.
      expert: nested dict like `state.merged`.
      budget: what its offset may take: a fraction of the merged model's bytes below 1, or a number of bytes.
      bits: of an entry of its factors, see `coding.BITS`.
      vector_bits: of an entry of its offsets below two axes.
      project: whether it uses the shared factors.

    Returns:
      The state of T + 1 tasks. Its report is still that of the fit.

    Raises:
      ValueError: if the state has a generator of fewer than T embeddings, the expert does not fit the merged
        model, or the budget is too small for what is not chosen by it: the embeddings' growth, the leaves below
        two axes, and the task factors of the projection.
    """
    _check(state, expert)
    bases = _bases(state)
    merged, flat = tree.flatten(state.merged), tree.flatten(expert)
    names = [name for name, leaf in merged.items() if tree.is_float(leaf.dtype)]
    plans = plan_leaves(
        {name: jax.ShapeDtypeStruct(merged[name].shape, merged[name].dtype) for name in names},
        state.layout,
        rank=1,
        rank_rule="clip",
    )
    total = budget * tree.param_bytes(state.merged) if budget < 1 else budget
    vectors = [merged[name] for name in names if name not in plans]
    # As in `fit`: the embeddings' growth, a shared scalar of each vector, the last byte of codes.
    total -= 4 * (2 * state.num_tasks + 1) + 4 * len(vectors) + 2 * len(plans)
    total -= sum(coded_bytes(leaf.size, 1, vector_bits if leaf.ndim else 32) for leaf in vectors)
    projections: dict[str, Stored] = {}
    remaining: dict[str, jax.Array] = {}
    added: dict[str, OwnForm | None] = {}
    for name in names:
        difference = jnp.asarray(flat[name], jnp.float32) - jnp.asarray(merged[name], jnp.float32)
        if name not in plans:
            added[name] = elementwise(difference[None], vector_bits)
            continue
        matrix = jnp.asarray(tree.to_matrix(difference, plans[name].view))
        remaining[name] = matrix[None]
        root = _root(bases.get(name))
        if project and isinstance(root, Product):
            oriented = matrix if root.orientation == "right" else matrix.T
            factors = code_factors(oriented[None], jnp.asarray(dense(root.shared)), bits)
            projections[name] = factors
            total -= tree.param_bytes(factors)
            product = Product(factors, root.shared, root.orientation)
            remaining[name] = (matrix - product.offset(jnp.ones(1)))[None]
    if total <= 0:
        raise ValueError(
            f"budget: got {budget!r}, {-total:.0f} bytes too few for the embeddings, the leaves below two "
            f"axes and the projection (project = {project}) at bits = {bits}, vector_bits = {vector_bits}"
        )
    ranks = _ranks(plans, remaining, total, bits)
    for name, matrix in remaining.items():
        own = separate.solve(matrix, ranks[name], np.ones(1), bits).form
        added[name] = own if sum(ranks[name]) else None
    offsets: dict[str, Form] = {
        name: Extended(bases.get(name), projections.get(name), added[name])
        for name in names
        if name in bases or added[name] is not None
    }
    embeddings = jnp.eye(state.num_tasks + 1, dtype=jnp.float32)
    return replace(state, task_embeddings=embeddings, offsets=offsets)


def remove_task(state: OffsetState, task: int) -> OffsetState:
    """Removes one task from a state. What the others store stays as it is, shared factors too.

    Args:
      state: from `fit` or `add_task`, in the baked form.
      task: task id, 0 to T - 1; later tasks move up by one.

    Returns:
      The state of T - 1 tasks. Removing the task that was added last gives back the state as it was. Its report
      is still that of all tasks of the fit.

    Raises:
      ValueError: if the state has a generator of fewer than T embeddings, or `task` is no integer, out of
        range or the only one.
    """
    _check_baked(state)
    if not 0 <= tree.as_integer("task", task) < state.num_tasks or state.num_tasks == 1:
        raise ValueError(
            f"task: got {task}, expected 0 to {state.num_tasks - 1}, and one task must stay"
        )
    kept = {name: _without(form, task, state.num_tasks) for name, form in _bases(state).items()}
    return replace(
        state,
        task_embeddings=jnp.eye(state.num_tasks - 1, dtype=jnp.float32),
        offsets={name: form for name, form in kept.items() if form is not None},
    )


def _without(form: OwnForm | None, task: int, num_tasks: int) -> OwnForm | None:
    others = np.delete(np.arange(num_tasks), task)
    if isinstance(form, Extended):
        if task == num_tasks - 1:
            return form.base
        base = _without(form.base, task, num_tasks - 1)
        is_empty = base is None and form.projection is None and form.own is None
        return None if is_empty else replace(form, base=base)
    if isinstance(form, Elementwise | Product):
        return replace(form, generator=take(form.generator, others))
    if isinstance(form, Separate):
        owners = np.repeat(np.arange(num_tasks), form.ranks)
        rows = np.flatnonzero(owners != task)
        ranks = tuple(form.ranks[other] for other in others)
        return (
            Separate(take(form.left, rows), take(form.right, rows), ranks) if sum(ranks) else None
        )
    if form is None:
        return None
    raise ValueError(f"state: offsets of the form {type(form).__name__} are of all tasks together")


def _bases(state: OffsetState) -> dict[str, OwnForm]:
    """The leaves' own forms.

    Raises:
      ValueError: if leaves share one.
    """
    bases: dict[str, OwnForm] = {}
    for name, form in state.offsets.items():
        if isinstance(form, Tied):
            raise ValueError(
                f"state: {name} shares the offset of {form.owner}: tasks can't be changed"
            )
        bases[name] = form
    return bases


def _root(form: OwnForm | None) -> OwnForm | None:
    while isinstance(form, Extended):
        form = form.base
    return form


def _ranks(
    plans: Mapping[str, LeafPlan], remaining: Mapping[str, jax.Array], budget: float, bits: int
) -> dict[str, tuple[int, ...]]:
    weight = np.ones(1)
    measured = {
        name: budgets.spectra(matrix, weight, "separate") for name, matrix in remaining.items()
    }
    chosen = budgets.allocate(plans, measured, budget, bits=bits, sharing="separate")
    return {name: plan.task_ranks or (0,) for name, plan in chosen.items()}


def _check_baked(state: OffsetState) -> None:
    num_tasks, width = state.task_embeddings.shape
    if width != num_tasks or not np.array_equal(state.task_embeddings, np.eye(num_tasks)):
        raise ValueError(
            f"state: its {num_tasks} tasks share a generator of {width} embeddings, expected the baked form"
        )


def _check(state: OffsetState, expert: Params) -> None:
    _check_baked(state)
    merged, flat = tree.flatten(state.merged), tree.flatten(expert)
    problems = [f"missing leaf {name}" for name in merged if name not in flat]
    problems += [f"extra leaf {name}" for name in flat if name not in merged]
    for name in merged.keys() & flat.keys():
        if flat[name].shape != merged[name].shape:
            problems.append(f"{name} has shape {flat[name].shape}, expected {merged[name].shape}")
        elif tree.is_float(flat[name].dtype) and not np.isfinite(np.asarray(flat[name])).all():
            problems.append(f"{name} has values that are NaN or Inf")
    if problems:
        raise ValueError(
            "expert: it does not fit the merged model:\n  " + "\n  ".join(sorted(problems))
        )
