"""Routers: small classifiers of an input's task by its features, trained on calibration inputs by task.

"mlp" is Twin-Merging's (arXiv:2406.15479, section 3.4; layers, dropout, batch norm and optimiser as in the
authors' code: d -> 2d -> 2d -> T, batch norm and LeakyReLU and dropout 0.5 after the first two; Adam,
gradients clipped to norm 1, learning rate falling linearly to 0, batches of 1024, 50 epochs).
"linear" is SMEAR's (arXiv:2306.03745, section 3; a layer norm before it as in the authors' code, or none).

The authors of Twin-Merging keep the epoch of the best accuracy *on the test set*, a leak. Here a part of the
calibration inputs of each task is held out and chooses: the best accuracy, and of those the lowest loss. Few held-out
inputs are often all right from the first epochs on, where a softmax is still close to uniform.

The order of tasks does not matter: training sees them sorted by name, and the outputs are put back.
Float32. What remains of an epoch after its last whole batch is left out of that epoch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from retex_jax import sharding
from retex_jax.typing import Array, Params

Kind = Literal["mlp", "linear"]

_TORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Mlp(nn.Module):
    """Twin-Merging's router.

    Attributes:
      hidden: width of both hidden layers.
      num_tasks: T.
      batch_norm: whether each hidden layer is batch-normalised.
      dropout: fraction of hidden units dropped in training.
    """

    hidden: int
    num_tasks: int
    batch_norm: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps features [B, d] to logits [B, T]."""
        for index in range(2):
            x = nn.Dense(self.hidden, kernel_init=_TORCH_INIT, name=f"hidden_{index}")(x)
            if self.batch_norm:
                x = nn.BatchNorm(momentum=0.9, use_running_average=not train, name=f"norm_{index}")(
                    x
                )
            x = nn.leaky_relu(x, 0.01)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_tasks, kernel_init=_TORCH_INIT, name="out")(x)


class Linear(nn.Module):
    """SMEAR's router: a layer norm without parameters of its own, and one linear layer.

    Attributes:
      num_tasks: T.
      layer_norm: whether there is the layer norm.
    """

    num_tasks: int
    layer_norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps features [B, d] to logits [B, T]."""
        del train
        if self.layer_norm:
            x = nn.LayerNorm(use_bias=False, use_scale=False)(x)
        return nn.Dense(self.num_tasks, kernel_init=nn.initializers.normal(0.01), name="out")(x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Router:
    """A trained router.

    Attributes:
      variables: of the Linen module: "params", and "batch_stats" where it has a batch norm.
      kind: "mlp" or "linear".
      layer_norm: of "linear".
    """

    variables: Params
    kind: Kind = field(metadata={"static": True})
    layer_norm: bool = field(default=True, metadata={"static": True})


def logits(router: Router, features: Array) -> jax.Array:
    """Logits over tasks.

    Args:
      router: from `fit`.
      features: [B, d], float32.

    Returns:
      [B, T], float32.
    """
    params = router.variables["params"]
    num_tasks = params["out"]["bias"].shape[0]
    if router.kind == "linear":
        module: nn.Module = Linear(num_tasks, router.layer_norm)
    else:
        hidden = params["hidden_0"]["bias"].shape[0]
        module = Mlp(hidden, num_tasks, "batch_stats" in router.variables)
    return jnp.asarray(module.apply(router.variables, jnp.asarray(features, jnp.float32)))


def weights(router: Router, features: Array) -> jax.Array:
    """softmax(router(features)): [B, T], float32."""
    return jax.nn.softmax(logits(router, features), axis=-1)


def fit(
    features: Sequence[Array],
    names: Sequence[str],
    key: jax.Array,
    *,
    kind: Kind = "mlp",
    batch_norm: bool = True,
    layer_norm: bool = True,
    dropout: float = 0.5,
    learning_rate: float = 5e-4,
    epochs: int = 50,
    batch_size: int = 1024,
    held_out: float = 0.1,
    mesh: Mesh | None = None,
) -> Router:
    """Trains a router by the cross-entropy of task ids.

    Args:
      features: T arrays [n_t, d], float32.
      names: T unique names of tasks.
      key: typed PRNG key; the same key gives the same router.
      kind: "mlp" or "linear".
      batch_norm: of "mlp".
      layer_norm: of "linear".
      dropout: of "mlp", in [0, 1).
      learning_rate: at the start.
      epochs: passes over the inputs.
      batch_size: inputs a step; all of them where there are fewer.
      held_out: fraction of each task's inputs that chooses the epoch; one input a task at least.
      mesh: of axes "data", over which each batch is divided, "model", over which parameters and optimizer are
        split, or both; the answer is that of one device, but for the rounding of sums, and for the biases before a
        batch norm: their gradients are nothing but rounding, of which Adam makes whole steps. One device when not
        given.

    Returns:
      The router of the best epoch.

    Raises:
      ValueError: if an option is out of range or a task has fewer than 2 inputs; all are listed. If the mesh
        has other axes.
      FloatingPointError: if a loss is not finite.
    """
    if mesh is not None:
        sharding.check_axes(mesh, (sharding.DATA, sharding.MODEL))
    problems = option_problems(
        kind=kind,
        dropout=dropout,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        held_out=held_out,
    )
    few = [name for name, array in zip(names, features, strict=True) if len(array) < 2]
    if few:
        problems.append(f"calibration: tasks {few} have 1 input, expected 2: one is held out")
    if problems:
        raise ValueError("\n".join(problems))
    order = sorted(range(len(names)), key=names.__getitem__)
    init_key, split_key, key = jax.random.split(key, 3)
    arrays = [np.asarray(features[task], np.float32) for task in order]
    (x, y), (held_x, held_y) = _split(arrays, split_key, held_out)
    module: Any = Linear(len(names), layer_norm)
    if kind == "mlp":
        module = Mlp(2 * x.shape[1], len(names), batch_norm, dropout)
    variables: Any = sharding.place(module.init(init_key, x[:1]), mesh, sharding.MODEL_RULES)
    batch_size = min(batch_size, len(x))
    steps = len(x) // batch_size
    init, train_epoch, measure = _programs(module, learning_rate, epochs, steps, batch_size, mesh)
    opt_state = init(variables["params"])
    best, best_variables = (-1.0, -math.inf), variables
    for epoch in range(epochs):
        variables, opt_state, loss = train_epoch(
            variables, opt_state, jax.random.fold_in(key, epoch), x, y
        )
        if not math.isfinite(loss):
            raise FloatingPointError(f"router: the loss of epoch {epoch + 1} is {float(loss)}")
        accuracy, held_loss = measure(variables, held_x, held_y)
        score = (float(accuracy), -float(held_loss))
        if score > best:
            best, best_variables = score, variables
    return Router(reordered(best_variables, np.argsort(order)), kind, layer_norm)


def option_problems(
    *,
    kind: str,
    dropout: float,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    held_out: float,
) -> list[str]:
    """What is wrong with options of `fit`."""
    problems = []
    if kind not in ("mlp", "linear"):
        problems.append(f"kind: got {kind!r}, expected 'mlp' or 'linear'")
    if not 0 <= dropout < 1:
        problems.append(f"dropout: got {dropout!r}, expected a fraction in [0, 1)")
    if not 0 < learning_rate < math.inf:
        problems.append(f"learning_rate: got {learning_rate!r}, expected a finite number above 0")
    if epochs < 1:
        problems.append(f"epochs: got {epochs!r}, expected 1 or more")
    if batch_size < 1:
        problems.append(f"batch_size: got {batch_size!r}, expected 1 or more")
    if not 0 < held_out < 1:
        problems.append(f"held_out: got {held_out!r}, expected a fraction in (0, 1)")
    return problems


_Part = tuple[np.ndarray, np.ndarray]


def _split(arrays: Sequence[np.ndarray], key: jax.Array, held_out: float) -> tuple[_Part, _Part]:
    """Features and task ids to train on, and held out."""
    train, held = [], []
    for task, array in enumerate(arrays):
        shuffled = array[
            np.asarray(jax.random.permutation(jax.random.fold_in(key, task), len(array)))
        ]
        count = min(max(1, round(held_out * len(array))), len(array) - 1)
        held.append(shuffled[:count])
        train.append(shuffled[count:])

    def joined(parts: list[np.ndarray]) -> _Part:
        ids = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        return np.concatenate(parts), ids

    return joined(train), joined(held)


@lru_cache(maxsize=8)
def _programs(
    module: Any,
    learning_rate: float,
    epochs: int,
    steps: int,
    batch_size: int,
    mesh: Mesh | None,
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The optimiser's start, an epoch and its measure; kept, so that routers of one kind compile once."""
    schedule = optax.linear_schedule(learning_rate, 0.0, epochs * steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def train_step(carry: Any, inputs: Any, x: jax.Array, y: jax.Array) -> Any:
        variables, opt_state = carry
        indices, key = inputs
        rest = {name: value for name, value in variables.items() if name != "params"}
        batch = sharding.constrain((x[indices], y[indices]), mesh, sharding.BATCH_RULES)

        def loss_fn(params: Params) -> Any:
            outputs, updated = module.apply(
                {"params": params, **rest},
                batch[0],
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch[1])
            return losses.mean(), updated

        (loss, updated), gradients = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        following = ({"params": params, **updated}, opt_state)
        return sharding.constrain(following, mesh, sharding.MODEL_RULES), loss

    @jax.jit
    def train_epoch(variables: Any, opt_state: Any, key: jax.Array, x: Array, y: Array) -> Any:
        order_key, dropout_key = jax.random.split(key)
        order = jax.random.permutation(order_key, x.shape[0])[: steps * batch_size]
        inputs = (order.reshape(steps, batch_size), jax.random.split(dropout_key, steps))
        x, y = jnp.asarray(x), jnp.asarray(y)
        (variables, opt_state), losses = jax.lax.scan(
            lambda carry, step: train_step(carry, step, x, y), (variables, opt_state), inputs
        )
        return variables, opt_state, losses.mean()

    @jax.jit
    def measure(variables: Any, x: Array, y: Array) -> Any:
        outputs: Any = module.apply(variables, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, y)
        return jnp.mean(outputs.argmax(axis=1) == y), losses.mean()

    return optimizer.init, train_epoch, measure


def reordered(variables: Any, columns: np.ndarray) -> Params:
    """Takes some outputs of the last layer, in this order."""
    params = dict(variables["params"])
    last = params["out"]
    params["out"] = {"kernel": last["kernel"][:, columns], "bias": last["bias"][columns]}
    return {**variables, "params": params}
