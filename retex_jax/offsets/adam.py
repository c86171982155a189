"""The paper's solver: offsets learned by gradient descent (ReTeX, arXiv:2606.26902, 4.1, 5 and B.1).

Each task has an embedding e_t [d_emb]; each leaf has one linear layer from the embedding to the task
factor G_t and a shared factor S, initialised at zero. Adam (2e-4, 600 steps of warm-up, cosine, 5000
steps) minimises Eq. 5, the sum over tasks and leaves of ||D_t - G_t S||^2, or another objective; all of the
paper's forms can be learned (see `retex_jax.offsets.generator`). The paper names neither d_emb
(T here), nor the initialisers (PyTorch's: embeddings N(0, 1), linear layers uniform in +-1/sqrt(d_emb)),
nor whether a step sums over all tasks or samples one (both are offered). All in float32. Unlike the exact
solver it holds the offsets of all experts in memory. Leaves of one shape are one stack.

On a mesh the leaves of a stack lie along its axis "layer", and along "model" the rows of what is fitted to, of the task
factors and of the generators: a device computes the gradient of its own rows from its own offsets. What the devices
exchange in a step are the shared factors and their gradients, the embeddings' gradients and the r x r Gram matrices of
the factors. Along the tasks nothing is split: each task's factors are made by the whole of a leaf's linear layer, of
which the devices would exchange all in every step.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from retex_jax import sharding, tree
from retex_jax.experts import ExpertSet
from retex_jax.offsets import generator, learned
from retex_jax.offsets.generator import LearnedForm, Loss, Objective, Problem
from retex_jax.offsets.state import LeafPlan, OffsetState
from retex_jax.preemption import Preempted
from retex_jax.typing import Params

TasksPerStep = Literal["all", "one"]

RULES: sharding.Rules = (
    (r"^target$", P(None, sharding.MODEL)),
    (r"^direction$", P(sharding.MODEL)),
    (r"(^|/)(embeddings|step|count|energies|alignments|direction_energy)$|^counts/", P()),
    (r"gamma_\w+$", P(sharding.LAYER)),
    (r"inner_weight$", P(sharding.LAYER, None, None, sharding.MODEL)),
    (r"inner_bias$", P(sharding.LAYER, None, sharding.MODEL)),
    (r"(^|/)(bias|shared)$|^directions/", P(sharding.LAYER, sharding.MODEL)),
    (r"(^|/)weight$|^targets/", P(sharding.LAYER, None, sharding.MODEL)),
)
"""Of a `TrainState`, of a `generator.Problem`, and of what one leaf gives to it."""

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

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved with that step."""
        ...

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any]) -> object:
        """Keeps a tree, and JSON values with it."""
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
    form: LearnedForm = "product",
    task_rank: int | None = None,
    d_emb: int | None = None,
    objective: Loss = "l2",
    l2_weight: float = 1.0,
    learning_rate: float = 2e-4,
    steps: int = 5000,
    warmup_steps: int = 600,
    tasks_per_step: TasksPerStep = "all",
    chunk_steps: int = 100,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 500,
    progress: ProgressFn | None = None,
    preempted: Callable[[], bool] | None = None,
    mesh: Mesh | None = None,
) -> OffsetState:
    """Learns the offsets.

    Args:
      experts: the experts.
      merged: the base that offsets are added to.
      plans: of every matrix leaf.
      key: typed PRNG key.
      form: "product" (ReTeX; ReTeX-Alt by the plans' orientation), "factorized" (ReTeX-E), "shape_shared"
        (ReTeX-S), or "affine" (Eq. 13).
      task_rank: r_g of "factorized".
      d_emb: size of the task embeddings; T when not given.
      objective: "l2" (Eq. 5), "cosine" (Eq. 15; with it the lengths of the task vectors are free), or
        "cosine_l2": cosine plus `l2_weight` times L2.
      l2_weight: lambda of "cosine_l2"; in the paper's Fig. 10 all of 0.2 and more do alike.
      learning_rate: Adam's peak learning rate.
      steps: of Adam.
      warmup_steps: of linear warm-up from 0, part of `steps`; cosine decay to 0 follows.
      tasks_per_step: "all": the sum over tasks; "one": one task sampled a step.
      chunk_steps: steps in one call of the compiled loop.
      checkpoints: where to keep the unfinished fit, and to resume from.
      checkpoint_every: steps between two checkpoints, a multiple of `chunk_steps`.
      progress: called after each chunk.
      preempted: called after each chunk; if it says so, the fit is kept there and left. With `checkpoints`.
      mesh: of axes "layer", "model" or both, over which parameters, optimizer and offsets are split (`RULES`); the
        answer is that of one device, but for the rounding of sums. One device when not given.

    Returns:
      The state: with d_emb + 1 >= T in the baked form, which is then smaller, else as a generator;
      "factorized" is always baked, as its offsets are not linear in the embedding. The report's optimum is
      that of the form with free task factors, a lower bound where d_emb < T - 1 and for "factorized"; unknown
      (NaN) for "affine". `report.gammas` has gamma_t of "affine" after each chunk, from where the fit was
      resumed.

    Raises:
      ValueError: for a setting that is out of range, if the mesh has other axes, if theta_0 is needed and
        missing, or if the checkpoint is of another fit.
      FloatingPointError: if the loss is not finite, with the step.
      Preempted: see `preempted`; it ends the program.
    """
    d_emb = experts.num_tasks if d_emb is None else d_emb
    settings: dict[str, Any] = {
        "form": form,
        "task_rank": task_rank,
        "d_emb": d_emb,
        "objective": objective,
        "l2_weight": l2_weight,
        "learning_rate": learning_rate,
        "steps": steps,
        "warmup_steps": warmup_steps,
        "tasks_per_step": tasks_per_step,
    }
    check_settings(**settings, chunk_steps=chunk_steps, checkpoint_every=checkpoint_every)
    if mesh is not None:
        sharding.check_axes(mesh, (sharding.LAYER, sharding.MODEL))
    base = tree.flatten(merged)
    groups = learned.group_leaves(experts, plans, form)

    def place(name: str, leaf: jax.Array) -> jax.Array:
        return sharding.place({name: leaf}, mesh, RULES)[name]

    problem = learned.make_problem(experts, base, plans, groups, form, objective, place)
    problem = sharding.place(problem, mesh, RULES)
    ranks = {
        index: plans[group[0]].rank if group[0] in plans else None
        for index, group in enumerate(groups)
    }
    init_key, sample_key = jax.random.split(key)
    optimizer = make_optimizer(learning_rate, warmup_steps, steps)

    def init() -> TrainState:
        params = generator.init_params(
            init_key, groups, problem.targets, ranks, d_emb, form=form, task_rank=task_rank
        )
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    if mesh is None:
        state = init()
    else:
        there = sharding.shardings(jax.eval_shape(init), mesh, RULES)
        state = jax.jit(init, out_shardings=there)()
    done = 0
    facts = _facts(experts, plans, problem, key, settings)
    if checkpoints is not None and (latest := checkpoints.latest()) is not None:
        _check_same(checkpoints.metadata(latest), facts, latest)
        state, done = checkpoints.restore(latest, state), latest
    run = partial(run_steps, optimizer, tasks_per_step, Objective(objective, l2_weight), form, mesh)
    gammas: list[dict[str, np.ndarray]] = []
    while done < steps:
        length = min(chunk_steps, steps - done)
        state, losses = run(length, state, problem, sample_key)
        done += length
        if form == "affine":
            gammas.append(_gammas(state.params, groups))
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
        if checkpoints is None:
            continue
        is_leaving = preempted is not None and preempted()
        if is_leaving or done % checkpoint_every == 0 or done == steps:
            checkpoints.save(done, state, facts)
        if is_leaving:
            raise Preempted(f"the Adam fit is saved at step {done} of {steps}")
    result = learned.to_state(
        experts, merged, plans, groups, problem, state.params, form, task_rank
    )
    for name in gammas[0] if gammas else ():
        result.report.gammas[name] = np.stack([chunk[name] for chunk in gammas])
    if not np.isfinite(result.report.residual):
        raise FloatingPointError(
            f"the Adam fit's residual is {result.report.residual} after step {steps}; "
            f"learning_rate = {learning_rate}"
        )
    return result


def _facts(
    experts: ExpertSet,
    plans: Mapping[str, LeafPlan],
    problem: Problem,
    key: jax.Array,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What tells a fit from others: texts, and the offsets' energies, which another device may round otherwise."""
    leaves = [
        (name, spec.shape, str(spec.dtype), plans.get(name))
        for name, spec in experts.leaves.items()
    ]
    drawn = jax.random.key_impl(key), jax.random.key_data(key).tolist()
    given = {**settings, "key": drawn, "experts": list(experts.names)}
    return {
        **{name: str(value) for name, value in given.items()},
        "leaves": hashlib.sha256(repr(leaves).encode()).hexdigest(),
        "energies": np.asarray(problem.energies, np.float64).tolist(),
    }


def _check_same(known: Mapping[str, Any], facts: Mapping[str, Any], step: int) -> None:
    other = [name for name in facts if name != "energies" and known.get(name) != facts[name]]
    # Lengths are the same where "experts" are.
    if not other and not np.allclose(known["energies"], facts["energies"], rtol=1e-3, atol=0):
        other = ["energies"]
    if other:
        raise ValueError(
            f"checkpoints: step {step} is of another fit, whose {other} differ; expected this fit's, or none"
        )


@lru_cache(maxsize=16)
def make_optimizer(
    learning_rate: float, warmup_steps: int, steps: int
) -> optax.GradientTransformation:
    """Adam by the paper's schedule; one object for the same numbers, as `run_steps` compares it by identity."""
    return optax.adam(
        optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps, 0.0)
    )


def _gammas(params: dict[str, Any], groups: list[list[str]]) -> dict[str, np.ndarray]:
    """gamma_t of every matrix leaf: [T]."""
    result = {}
    for index, group in enumerate(groups):
        if "gamma_weight" in params["groups"][index]:
            values = np.asarray(generator.gammas(params, index, params["embeddings"]))
            result |= dict(zip(group, values, strict=True))
    return result


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5), donate_argnums=6)
def run_steps(
    optimizer: optax.GradientTransformation,
    tasks_per_step: TasksPerStep,
    objective: Objective,
    form: LearnedForm,
    mesh: Mesh | None,
    length: int,
    state: TrainState,
    problem: Problem,
    key: jax.Array,
) -> tuple[TrainState, jax.Array]:
    """Takes steps, compiled as a loop.

    Args:
      optimizer: from `make_optimizer`.
      tasks_per_step: as for `fit`.
      objective: what is minimised.
      form: as for `fit`.
      mesh: on which state and problem lie by `RULES`; None for one device.
      length: steps.
      state: before them; its memory is taken.
      problem: what is fitted to.
      key: typed PRNG key, of the tasks that are sampled.

    Returns:
      The state after them, and the loss before each, [length].
    """
    num_tasks = len(problem.energies)
    loss_fn = partial(
        generator.objective_fn, objective=objective, form=form, is_split=mesh is not None
    )

    def step(state: TrainState, _: None) -> tuple[TrainState, jax.Array]:
        if tasks_per_step == "one":
            tasks = jax.random.randint(jax.random.fold_in(key, state.step), (1,), 0, num_tasks)
        else:
            tasks = None
        with jax.default_matmul_precision("highest"):
            loss, gradients = jax.value_and_grad(loss_fn)(state.params, problem, tasks)
        updates, opt_state = optimizer.update(gradients, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        following = TrainState(params, opt_state, state.step + 1)
        return sharding.constrain(following, mesh, RULES), loss

    return jax.lax.scan(step, state, length=length)


def check_settings(
    *,
    form: str = "product",
    task_rank: int | None = None,
    d_emb: int | None = None,
    objective: str = "l2",
    l2_weight: float = 1.0,
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
    if form not in get_args(LearnedForm):
        problems.append(f"form: got {form!r}, expected one of {get_args(LearnedForm)}")
    is_rank = task_rank is None if form != "factorized" else task_rank is not None and task_rank > 0
    if not is_rank:
        problems.append(
            f"task_rank: got {task_rank!r} with form = {form!r}, expected 1 or more with "
            "'factorized', None with others"
        )
    if objective not in get_args(Loss):
        problems.append(f"objective: got {objective!r}, expected one of {get_args(Loss)}")
    if not 0 < l2_weight < float("inf"):
        problems.append(f"l2_weight: got {l2_weight!r}, expected a positive number")
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
