"""The steps of fine-tuning a model over all devices of the machine, a batch taken whole or in parts.

AdamW (arXiv:1711.05101) with linear warm-up and cosine or linear decay, gradients cut to a norm of 1. A model is two
trees, of which one is trained and the other frozen: together "backbone" and "head".

Numerics: parameters, sums of gradients and the optimiser in float32; layers compute in their model's dtype, the head
in float32.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from retex_jax import data, probe, recovery, training
from retex_jax.typing import Batch, Params

SCHEDULES = ("cosine", "linear")


class Best(NamedTuple):
    """The best parameters so far.

    Attributes:
      score: theirs, float32.
      params: as `State.params`.
    """

    score: jax.Array | np.floating[Any]
    params: Params


class State(NamedTuple):
    """Everything that a step changes.

    Attributes:
      params: the trees that are trained, of "backbone" and "head".
      opt_state: of `make_optimizer`.
      best: None where the last parameters are kept.
    """

    params: Params
    opt_state: Any
    best: Best | None


def make_optimizer(
    *,
    learning_rate: float,
    weight_decay: float,
    decay_vectors: bool,
    schedule: str,
    warmup_steps: int,
    steps: int,
) -> optax.GradientTransformation:
    """AdamW with warm-up and decay to 0, after gradients are cut to a global norm of 1.

    Args:
      learning_rate: peak.
      weight_decay: decoupled.
      decay_vectors: whether leaves of one axis decay as well, biases and scales of norms.
      schedule: of the decay, one of `SCHEDULES`.
      warmup_steps: of linear warm-up from 0, part of `steps`.
      steps: of the whole run.

    Returns:
      The transformation.
    """
    rest = steps - warmup_steps
    decay = (
        optax.cosine_decay_schedule(learning_rate, rest)
        if schedule == "cosine"
        else optax.linear_schedule(learning_rate, 0.0, rest)
    )
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        decay = optax.join_schedules([warmup, decay], [warmup_steps])

    def decaying(params: Params) -> Params:
        return jax.tree.map(lambda leaf: decay_vectors or leaf.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(decay, weight_decay=weight_decay, mask=decaying),
    )


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(
    model: Any, params: Params, frozen: Params, batch: Batch
) -> tuple[jax.Array, Params]:
    """The mean loss of a batch, whose parts are taken one after the other, and its gradients.

    Args:
      model: Linen module of the backbone.
      params: the trees that are trained.
      frozen: the others, of "backbone" and "head".
      batch: input arrays [A, B / A, ...] and "label" [A, B / A]: A parts.

    Returns:
      The loss (see `probe.mean_loss`), float32, and the gradients, as `params`.
    """

    def loss_fn(params: Params, part: Batch) -> jax.Array:
        whole = {**params, **frozen}
        features = model.apply({"params": whole["backbone"]}, part).pooled.astype(jnp.float32)
        return probe.mean_loss(recovery.apply_head(whole["head"], features), part["label"])

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, part)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, batch)
    return jax.tree.map(lambda x: x / len(batch["label"]), total)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    model: Any,
    settings: tuple[tuple[str, Any], ...],
    state: State,
    frozen: Params,
    batch: Batch,
) -> tuple[State, jax.Array]:
    """One step of `make_optimizer`.

    Args:
      model: Linen module of the backbone.
      settings: keywords of `make_optimizer` as pairs, so that they can be a static argument.
      state: donated.
      frozen: as for `loss_and_gradients`.
      batch: as for `loss_and_gradients`.

    Returns:
      The next state and the loss.
    """
    loss, gradients = loss_and_gradients(model, state.params, frozen, batch)
    updates, opt_state = make_optimizer(**dict(settings)).update(
        gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state), loss


def length(num_examples: int, batch_size: int, steps: int, epochs: float) -> int:
    """Steps of a run: those that are given, or where they are 0 those that `epochs` take."""
    return steps or math.ceil(epochs * num_examples / batch_size)


def warmup_length(steps: int, warmup: float) -> int:
    """Steps of warm-up: `warmup` of them, or where it is below 1 that fraction of the run."""
    return math.ceil(warmup * steps) if warmup < 1 else int(warmup)


def finetune(
    model: Any,
    params: Params,
    frozen: Params,
    task: data.Task,
    unfinished: Path,
    *,
    steps: int,
    epochs: float,
    batch_size: int,
    accumulate: int,
    bucket: int,
    learning_rate: float,
    weight_decay: float,
    decay_vectors: bool,
    schedule: str,
    warmup: float,
    checkpoint_every: int,
    seed: int,
    measure: Callable[[Params], float] | None,
) -> Params:
    """Fine-tunes a model on a task; a run that was interrupted goes on where it was.

    Args:
      model: Linen module of the backbone.
      params: the trees that are trained, of "backbone" and "head"; kept as they are.
      frozen: the others.
      task: with a split "train".
      unfinished: the folder of the checkpoints.
      steps: of AdamW; 0: as many as `epochs` take.
      epochs: passes over the training split, where `steps` is 0.
      batch_size: B, a multiple of `accumulate` times the devices.
      accumulate: parts of a batch that are taken one after the other.
      bucket: batches whose texts are drawn together and put in order of length; see `data.bucketed_indices`.
      learning_rate: peak.
      weight_decay: decoupled.
      decay_vectors: as for `make_optimizer`.
      schedule: as for `make_optimizer`.
      warmup: part of the steps; a number of them, or below 1 a fraction.
      checkpoint_every: steps between two checkpoints.
      seed: of the order of the examples.
      measure: of the trained trees on the host, after each epoch and at the end; those of the highest score are
        kept, of equals the first. None: the last are.

    Returns:
      The trained trees, on the host.

    Raises:
      FloatingPointError: if the loss is not finite, with the step.
      Preempted: after a SIGTERM, when the step that is under way is saved; it ends the program.
      ValueError: if the warm-up takes the whole run.
    """
    train = task.splits["train"]
    count = len(train["label"])
    steps, an_epoch = length(count, batch_size, steps, epochs), math.ceil(count / batch_size)
    settings = {
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "decay_vectors": decay_vectors,
        "schedule": schedule,
        "warmup_steps": warmup_length(steps, warmup),
        "steps": steps,
    }
    if settings["warmup_steps"] >= steps:
        raise ValueError(f"finetune.warmup: got {warmup}, expected less than the {steps} steps")
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))
    # Copied: the step donates its state.
    own = jax.tree.map(jnp.array, params)
    best = Best(np.float32(-np.inf), jax.tree.map(jnp.array, params)) if measure else None
    state = State(own, make_optimizer(**settings).init(own), best)
    state, frozen = jax.device_put((state, frozen), everywhere)

    def read(step: int) -> dict[str, np.ndarray]:
        indices = data.bucketed_indices(train, batch_size, step, seed, bucket)
        batch = data.trim(data.materialize(data.take(train, indices)))
        return {name: x.reshape(accumulate, -1, *x.shape[1:]) for name, x in batch.items()}

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        batch = jax.device_put(batch, divided)
        return train_step(model, tuple(settings.items()), state, frozen, batch)

    def keep_best(number: int, state: State) -> State:
        if not (measure and state.best) or (number % an_epoch and number < steps):
            return state
        score = np.float32(measure(jax.device_get(state.params)))
        if not score > state.best.score:
            return state
        best = Best(score, jax.tree.map(jnp.copy, state.params))
        return state._replace(best=jax.device_put(best, everywhere))

    state = training.run(
        task.name,
        step,
        state,
        read,
        unfinished,
        steps=steps,
        checkpoint_every=checkpoint_every,
        learning_rate=learning_rate,
        after=keep_best,
    )
    return jax.device_get(state.best.params if state.best else state.params)
