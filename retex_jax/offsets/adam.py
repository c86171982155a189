"""The paper's solver: offsets learned by gradient descent (ReTeX, arXiv:2606.26902, 4.1, 5 and B.1).

Each task has an embedding e_t [d_emb]; each leaf has one linear layer from the embedding to the task
factor G_t and a shared factor S, initialised at zero. Adam (2e-4, 600 steps of warm-up, cosine, 5000
steps) minimises Eq. 5, the sum over tasks and leaves of ||D_t - G_t S||^2. The paper names neither d_emb
(T here), nor the initialisers (PyTorch's: embeddings N(0, 1), linear layers uniform in +-1/sqrt(d_emb)),
nor whether a step sums over all tasks or samples one (both are offered). All in float32. Unlike the exact
solver it holds the offsets of all experts in memory. Leaves of one shape are one stack.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, Protocol
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax

from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.offsets import exact
from retex_jax.offsets.forms import Elementwise, Form, Product
from retex_jax.offsets.state import FitReport, LeafPlan, OffsetState
from retex_jax.typing import FlatParams, Params

TasksPerStep = Literal["all", "one"]

ProgressFn = Callable[[int, int, float], None]
"""Called with (steps done, steps, loss of the last step)."""


class Checkpoints(Protocol):
    """Where unfinished fits are kept; `retex_jax.checkpoint.Checkpointer` is one."""

    def latest(self) -> int | None:
        """The newest whole step."""
        ...

    def restore(self, step: int, like: Any) -> Any:
        """The tree of that step."""
        ...

    def save(self, step: int, tree: Any) -> None:
        """Keeps a tree."""
        ...


class TrainState(NamedTuple):
    """Everything that a step changes."""

    params: Any
    opt_state: Any
    step: jax.Array


def fit(
    experts: ExpertSet,
    merged: Params,
    plans: dict[str, LeafPlan],
    *,
    key: jax.Array,
    d_emb: int | None = None,
    learning_rate: float = 2e-4,
    steps: int = 5000,
    warmup_steps: int = 600,
    tasks_per_step: TasksPerStep = "all",
    chunk_steps: int = 100,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 500,
    progress: ProgressFn | None = None,
) -> OffsetState:
    """Learns the offsets.

    Args:
      experts: the experts.
      merged: the base that offsets are added to.
      plans: of every matrix leaf.
      key: typed PRNG key.
      d_emb: size of the task embeddings; T when not given.
      learning_rate: Adam's peak learning rate.
      steps: of Adam.
      warmup_steps: of linear warm-up from 0, part of `steps`; cosine decay to 0 follows.
      tasks_per_step: "all": the sum over tasks; "one": one task sampled a step.
      chunk_steps: steps in one call of the compiled loop.
      checkpoints: where to keep the unfinished fit, and to resume from.
      checkpoint_every: steps between two checkpoints, a multiple of `chunk_steps`.
      progress: called after each chunk.

    Returns:
      The state: with d_emb + 1 >= T in the baked form, which is then smaller, else as a generator. The
      report's optimum is that of free task factors, a lower bound where d_emb < T - 1.

    Raises:
      ValueError: for a setting that is out of range.
      FloatingPointError: if the loss is not finite, with the step.
    """
    d_emb = experts.num_tasks if d_emb is None else d_emb
    check_settings(
        d_emb=d_emb,
        learning_rate=learning_rate,
        steps=steps,
        warmup_steps=warmup_steps,
        tasks_per_step=tasks_per_step,
        chunk_steps=chunk_steps,
        checkpoint_every=checkpoint_every,
    )
    base = tree.flatten(merged)
    groups = _group_leaves(experts, plans)
    targets = {
        index: jnp.stack([_target(experts, base, name, plans) for name in group])
        for index, group in enumerate(groups)
    }
    ranks = {
        index: plans[group[0]].rank if group[0] in plans else None
        for index, group in enumerate(groups)
    }
    init_key, sample_key = jax.random.split(key)
    optimizer = _optimizer(learning_rate, warmup_steps, steps)
    params = init_params(init_key, groups, targets, ranks, d_emb)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    done = 0
    if checkpoints is not None and (latest := checkpoints.latest()) is not None:
        state, done = checkpoints.restore(latest, state), latest
    run = partial(_run_steps, optimizer, tasks_per_step)
    while done < steps:
        length = min(chunk_steps, steps - done)
        state, losses = run(length, state, targets, sample_key)
        done += length
        losses = np.asarray(losses)
        loss = float(losses[-1])
        if not np.isfinite(losses).all():
            first = int(np.argmin(np.isfinite(losses)))
            raise FloatingPointError(
                f"the Adam fit's loss is {losses[first]} at step {done - length + first + 1}; "
                f"learning_rate = {learning_rate}"
            )
        if progress:
            progress(done, steps, loss)
        if checkpoints is not None and (done % checkpoint_every == 0 or done == steps):
            checkpoints.save(done, state)
    result = _to_state(experts, merged, plans, groups, targets, state.params)
    if not np.isfinite(result.report.residual):
        raise FloatingPointError(
            f"the Adam fit's residual is {result.report.residual} after step {steps}; "
            f"learning_rate = {learning_rate}"
        )
    return result


@lru_cache(maxsize=16)
def _optimizer(learning_rate: float, warmup_steps: int, steps: int) -> optax.GradientTransformation:
    # Cached: it is a static argument of the compiled loop, compared by identity.
    return optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps, 0.0)
    )


def init_params(
    key: jax.Array,
    names: list[list[str]],
    targets: dict[int, jax.Array],
    ranks: dict[int, int | None],
    d_emb: int,
) -> dict[str, Any]:
    """Draws the initial parameters.

    Args:
      key: typed PRNG key, folded by leaf name, so that a leaf's draw does not depend on the others.
      names: of the G leaves of each group.
      targets: offsets by group of leaves, [G, T, a, b] or, below two axes, [G, T, *shape].
      ranks: by group; None below two axes.
      d_emb: size of the embeddings.

    Returns:
      {"embeddings": [T, d_emb], "groups": {group: {"weight": [G, d_emb, a, r] or [G, d_emb, *shape],
      "bias": without d_emb, "shared": zeros [G, r, b] or [G]}}}, float32.
    """
    num_tasks = targets[0].shape[1]
    embedding_key, key = jax.random.split(key)
    groups = {}
    for index, target in targets.items():
        size, _, *shape = target.shape
        rank = ranks[index]
        factor = (*shape,) if rank is None else (shape[0], rank)
        shared = (size,) if rank is None else (size, rank, shape[1])
        hashes = np.array([crc32(name.encode()) for name in names[index]], np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
        # Weight and bias in one draw: PyTorch takes both from the same interval.
        bound = d_emb**-0.5
        draw = partial(jax.random.uniform, shape=(d_emb + 1, *factor), minval=-bound, maxval=bound)
        linear = jax.vmap(draw)(keys)
        groups[index] = {
            "weight": linear[:, :-1],
            "bias": linear[:, -1],
            "shared": jnp.zeros(shared),
        }
    return {"embeddings": jax.random.normal(embedding_key, (num_tasks, d_emb)), "groups": groups}


def task_factors(params: dict[str, Any], index: int, embeddings: jax.Array) -> jax.Array:
    """Generates G_t of one group of leaves for a batch of embeddings [t, d_emb].

    Returns:
      [G, t, a, r] or, below two axes, [G, t, *shape].
    """
    group = params["groups"][index]
    factor = jnp.einsum("td,gd...->gt...", embeddings, group["weight"], precision="highest")
    return factor + group["bias"][:, None]


def predict(params: dict[str, Any], index: int, embeddings: jax.Array) -> jax.Array:
    """Generates the offsets of one group of leaves (Eq. 3) for a batch of embeddings [t, d_emb].

    Returns:
      [G, t, a, b] or, below two axes, [G, t, *shape].
    """
    factor = task_factors(params, index, embeddings)
    shared = params["groups"][index]["shared"]
    if shared.ndim == 1:
        return factor * shared.reshape(-1, *[1] * (factor.ndim - 1))
    return jnp.einsum("gtar,grb->gtab", factor, shared, precision="highest")


def loss_fn(
    params: dict[str, Any], targets: dict[int, jax.Array], tasks: jax.Array | None = None
) -> jax.Array:
    """Eq. 5 over the given tasks [t] (None: all): the sum of squared errors of all their leaves.

    A matrix leaf's square is multiplied out, ||D||^2 - 2 <D S^T, G> + <G^T G, S S^T>, so that no product
    G S is formed: a step then takes two large matrix products instead of three, and no array as large as
    the offsets. The value is right to float32 rounding of ||D||^2.
    """
    embeddings = params["embeddings"] if tasks is None else params["embeddings"][tasks]
    squares = []
    for index, target in targets.items():
        offsets = target if tasks is None else target[:, tasks]
        shared = params["groups"][index]["shared"]
        if shared.ndim == 1:
            squares.append(jnp.sum((predict(params, index, embeddings) - offsets) ** 2))
            continue
        # Stacked vertically: contracting one axis (T a) is much faster on CPUs than two.
        stack = offsets.reshape(len(offsets), -1, offsets.shape[-1])
        factor = task_factors(params, index, embeddings).reshape(*stack.shape[:2], -1)
        projected = jnp.einsum("gnb,grb->gnr", stack, shared)
        factor_gram = jnp.einsum("gnr,gns->grs", factor, factor)
        shared_gram = jnp.einsum("grb,gsb->grs", shared, shared)
        squares.append(
            jnp.sum(stack**2) - 2 * jnp.sum(projected * factor) + jnp.sum(factor_gram * shared_gram)
        )
    return jnp.stack(squares).sum()


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _run_steps(
    optimizer: optax.GradientTransformation,
    tasks_per_step: TasksPerStep,
    length: int,
    state: TrainState,
    targets: dict[int, jax.Array],
    key: jax.Array,
) -> tuple[TrainState, jax.Array]:
    num_tasks = targets[0].shape[1]

    def step(state: TrainState, _: None) -> tuple[TrainState, jax.Array]:
        if tasks_per_step == "one":
            tasks = jax.random.randint(jax.random.fold_in(key, state.step), (1,), 0, num_tasks)
        else:
            tasks = None
        with jax.default_matmul_precision("highest"):
            loss, gradients = jax.value_and_grad(loss_fn)(state.params, targets, tasks)
        updates, opt_state = optimizer.update(gradients, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), loss

    return jax.lax.scan(step, state, length=length)


def _group_leaves(experts: ExpertSet, plans: dict[str, LeafPlan]) -> list[list[str]]:
    keys = {
        name: (plans[name].solved_shape, plans[name].rank)
        if name in plans
        else experts.leaves[name].shape
        for name in experts.float_leaves
    }
    return tree.groups(keys, lambda key: len(keys))


def _target(
    experts: ExpertSet, base: FlatParams, name: str, plans: dict[str, LeafPlan]
) -> jax.Array:
    if name in plans:
        return exact.difference_matrices(experts, base, name, plans[name])
    return exact.difference_vectors(experts, base, name)


def _to_state(
    experts: ExpertSet,
    merged: Params,
    plans: Mapping[str, LeafPlan],
    groups: list[list[str]],
    targets: dict[int, jax.Array],
    params: dict[str, Any],
) -> OffsetState:
    offsets: dict[str, Form] = {}
    report = FitReport({}, {}, {}, {})
    ones = jnp.ones((experts.num_tasks, 1))
    embeddings = jnp.concatenate([params["embeddings"], ones], axis=1)
    bake = experts.num_tasks <= embeddings.shape[1]
    for index, group in enumerate(groups):
        learned = params["groups"][index]
        generator = jnp.concatenate([learned["weight"], learned["bias"][:, None]], axis=1)
        if bake:
            generator = jnp.einsum("tk,gk...->gt...", embeddings, generator, precision="highest")
        for position, name in enumerate(group):
            factors = (generator[position], learned["shared"][position])
            if name in plans:
                offsets[name] = Product(*factors, plans[name].orientation)
            else:
                offsets[name] = Elementwise(*factors)
        error = predict(params, index, params["embeddings"]) - targets[index]
        residual = jnp.sum(error**2, axis=tuple(range(1, error.ndim)))
        if group[0] in plans:
            solution = exact.solve_group(targets[index], plans[group[0]].rank)
            exact.add_to_report(report, group, solution._replace(residual=residual))
            continue
        for position, name in enumerate(group):
            report.residuals[name] = float(residual[position])
            report.optima[name] = 0.0
            report.energies[name] = float(jnp.sum(targets[index][position] ** 2))
    return OffsetState(
        merged=merged,
        task_embeddings=jnp.eye(experts.num_tasks) if bake else embeddings,
        offsets=dict(sorted(offsets.items())),
        report=report,
        layout=experts.layout,
    )


def check_settings(
    *,
    d_emb: int | None = None,
    learning_rate: float = 2e-4,
    steps: int = 5000,
    warmup_steps: int = 600,
    tasks_per_step: str = "all",
    chunk_steps: int = 100,
    checkpoint_every: int = 500,
) -> None:
    """Checks the settings of `fit` without its data.

    Raises:
      ValueError: listing every setting that is out of range.
    """
    problems = []
    if d_emb is not None and d_emb < 1:
        problems.append(f"d_emb: got {d_emb}, expected 1 or more")
    if not 0 < learning_rate < float("inf"):
        problems.append(f"learning_rate: got {learning_rate}, expected a positive number")
    if steps < 1:
        problems.append(f"steps: got {steps}, expected 1 or more")
    if not 0 <= warmup_steps < steps:
        problems.append(f"warmup_steps: got {warmup_steps}, expected 0 to steps - 1 = {steps - 1}")
    if tasks_per_step not in ("all", "one"):
        problems.append(f"tasks_per_step: got {tasks_per_step!r}, expected 'all' or 'one'")
    if chunk_steps < 1 or checkpoint_every < 1 or checkpoint_every % chunk_steps:
        problems.append(
            f"checkpoint_every: got {checkpoint_every}, expected a multiple of "
            f"chunk_steps = {chunk_steps} >= 1"
        )
    if problems:
        raise ValueError("; ".join(problems))
