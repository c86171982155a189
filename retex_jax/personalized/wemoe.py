"""WEMoE (arXiv:2402.00433): Task Arithmetic, but for the MLPs, whose task vectors are mixed by gates.

Every leaf outside the MLPs is theta_0 + 0.3 sum_t tau_t. An MLP runs, for each input, with
theta_0 + sum_t g_t(h) tau_t, where h are the hidden states that enter it: g(h) is a two-layer ReLU network of width d
at every token, whose outputs are *then* averaged over tokens, in both of the codes below (the mean of h through the
gate would be another thing, as ReLU is between). Weights start with a standard deviation of 0.01, biases at 0, the
last bias at 0.3: close to Task Arithmetic. The gates learn by test-time adaptation: 1000 steps of Adam on the sum over
tasks of the mean entropy of a batch, 16 inputs of each task through its own head. Needs unlabelled test inputs by
task: transductive, and the tasks of the inputs of adaptation are known.

Two codes of the same first author differ. The paper's repository gates every input alone in adaptation, and its
learning rate falls as a cosine (`batch_gate=False, cosine=True`). The later fusion_bench takes the batch's mean
gates and a constant rate, 1e-4, and is cheaper (`batch_gate=True, cosine=False`, the default here). At inference both
gate every input alone. Rates of 1e-3, 1e-4 and 5e-5 are in use; the default is 1e-3. Padding, which the image models
of the codes do not have, takes no part in the mean over tokens.

With a known task `recover` takes one-hot gates: the expert's MLPs in the Task Arithmetic of the rest.

MLPs are found by their path, "mlp" at its end, and gated by `gating`, for any Linen model with unrolled blocks.
Memory: T MLPs a block beside the model, in the experts' dtype. Adaptation with `batch_gate` holds one set of
mixed MLPs and the activations of one task's batch (gradients add up over tasks), without it one set an input;
`predict` holds `chunk` sets.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from retex_jax import tree
from retex_jax.calibration import Calibration, require
from retex_jax.experts import ExpertSet
from retex_jax.mergers.leafwise import check_finite_number, merge_leaves
from retex_jax.mergers.task_arithmetic import add_task_vectors
from retex_jax.personalized import bank, gate_training, gating, routing
from retex_jax.typing import Array, Batch, FlatParams, Params, ProgressFn

NEEDS = "unlabelled test inputs, by task"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WemoeState:
    """The static part of the model, the experts' MLPs and the gates.

    Attributes:
      base: nested dict; Task Arithmetic, and theta_0 at the MLPs.
      experts: by leaf of an MLP, [T, *shape], the leaf's dtype.
      gates: by path of an MLP; see `gating.Gates`.
      mask: the batch's entry that is non-zero at real tokens, or None.
    """

    base: Params
    experts: FlatParams
    gates: Mapping[str, Mapping[str, jax.Array]]
    mask: str | None = field(metadata={"static": True})

    @property
    def num_tasks(self) -> int:
        """T."""
        return bank.num_tasks(self.experts)


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    calibration: Calibration | None = None,
    scaling: float = 0.3,
    init_gate: float = 0.3,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    batch_gate: bool = True,
    cosine: bool = False,
    pattern: str = r"(^|/)mlp$",
    mask: str | None = "attention_mask",
    progress: ProgressFn | None = None,
) -> WemoeState:
    """Merges what is not an MLP, and adapts the gates.

    Args:
      experts: the experts.
      key: typed PRNG key of the gates' start, folded by module and task; `jax.random.key(0)` when not given.
      calibration: unlabelled test inputs by task, in batches of 16 as the authors take them; the batches of each
        task are gone through again and again. `logits` and `heads` are read.
      scaling: lambda of Task Arithmetic.
      init_gate: the gates' last bias at the start.
      steps: of adaptation; 0 leaves the gates at their start.
      learning_rate: of Adam.
      batch_gate: whether a batch in adaptation shares its mean gates.
      cosine: whether the learning rate falls to 0 as a cosine.
      pattern: regular expression that is searched in module paths.
      mask: the batch's entry that is non-zero at real tokens; batches may lack it.
      progress: called with (steps done, steps).

    Returns:
      The state.

    Raises:
      ValueError: if the calibration is missing or does not fit, an option is out of range, no module
        matches, or a module that does has no leaves.
      FloatingPointError: if an entropy is not finite.
    """
    calibration = require(calibration, "WEMoE", experts.num_tasks)
    check_finite_number("scaling", scaling)
    check_finite_number("init_gate", init_gate)
    problems = []
    if steps < 0:
        problems.append(f"steps: got {steps!r}, expected 0 or more")
    if not 0 < learning_rate < math.inf:
        problems.append(f"learning_rate: got {learning_rate!r}, expected a finite number above 0")
    if problems:
        raise ValueError("\n".join(problems))
    logits, heads = calibration.logits, calibration.heads
    # Names of leaves decide nothing here: which modules there are is asked of the model itself.
    widths = gating.widths(
        lambda params, batch: logits(params, heads[0], batch),
        experts.pretrained_params(),
        next(iter(calibration.batches[0])),
        pattern,
    )
    leaves = {path: _below(path, experts.float_leaves) for path in widths}
    empty = [path for path, names in leaves.items() if not names]
    if empty:
        raise ValueError(f"experts: no leaves below the modules {empty}")
    gated = sorted({name for names in leaves.values() for name in names})
    key = jax.random.key(0) if key is None else key
    gates = {
        path: _initial(key, path, width, experts.names, init_gate) for path, width in widths.items()
    }
    state = WemoeState(_base(experts, gated, scaling), bank.stack(experts, gated), gates, mask)
    if not steps:
        return state
    adapted = gate_training.adapt(
        state.base,
        state.experts,
        gates,
        calibration,
        mask,
        steps=steps,
        learning_rate=learning_rate,
        batch_gate=batch_gate,
        cosine=cosine,
        progress=progress,
    )
    return WemoeState(state.base, state.experts, adapted, mask)


def _below(path: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{path}/")]


def _base(experts: ExpertSet, gated: list[str], scaling: float) -> Params:
    def merge_leaf(name: str) -> jax.Array:
        if name in gated:
            return jnp.asarray(experts.pretrained(name), jnp.float32)
        return add_task_vectors(experts, name, scaling=scaling)

    return merge_leaves(experts, merge_leaf)


def _initial(
    key: jax.Array, path: str, width: int, names: tuple[str, ...], init_gate: float
) -> dict[str, jax.Array]:
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    columns = [
        jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), (width,))
        for name in names
    ]
    return {
        "hidden_kernel": 0.01 * jax.random.normal(key, (width, width)),
        "hidden_bias": jnp.zeros(width),
        "kernel": 0.01 * jnp.stack(columns, axis=1),
        "bias": jnp.full(len(names), init_gate, jnp.float32),
    }


def mix(state: WemoeState, weights: Array) -> Params:
    """The model whose gates are `weights` in every MLP.

    Args:
      state: from `fit`.
      weights: over tasks, [T], float32.

    Returns:
      Nested dict like the pretrained model; sums are float32, then cast to each leaf's dtype.

    Raises:
      ValueError: if `weights` is not of shape [T].
    """
    return bank.mix(state.base, state.experts, weights)


def recover(state: WemoeState, task: int | jax.Array) -> Params:
    """The expert's MLPs, and Task Arithmetic elsewhere: the model of a known task, without the gates.

    Args:
      state: from `fit`.
      task: task id, 0 to T - 1; may be traced, and is then not checked.

    Returns:
      Nested dict like the pretrained model.

    Raises:
      ValueError: if `task` is out of range.
    """
    return mix(state, routing.one_hot(task, state.num_tasks))


def extra_bytes(state: WemoeState) -> int:
    """Bytes beside `base`, for all tasks: T experts' MLPs and the gates."""
    return tree.param_bytes((state.experts, state.gates))


@partial(jax.jit, static_argnames=("function", "chunk"))
def _gated(
    state: WemoeState, batch: Batch, *, function: Callable[[Params, Batch], jax.Array], chunk: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    def one(example: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        output, values = gating.run(
            function, state.base, state.experts, state.gates, routing.single(example), state.mask
        )
        return output[0], values

    return routing.map_examples(one, dict(batch), chunk)


def weights(
    state: WemoeState, model: routing.ModelFunctions, batch: Batch, *, chunk: int = 8
) -> dict[str, jax.Array]:
    """What decides: the gates of every input in every MLP.

    Args:
      state: from `fit`.
      model: `features` is read.
      batch: arrays [B, ...].
      chunk: sets of mixed MLPs in memory at a time.

    Returns:
      By path of an MLP: [B, T], float32; their sums are free.

    Raises:
      ValueError: if `chunk` is not a positive integer.
    """
    routing.check_chunk(chunk)
    return _gated(state, batch, function=model.features, chunk=chunk)[1]


def predict(
    state: WemoeState, model: routing.ModelFunctions, batch: Batch, *, chunk: int = 8
) -> jax.Array:
    """Features of every input, its MLPs mixed by its own gates; one pass.

    Args:
      state: from `fit`.
      model: `features` is read.
      batch: arrays [B, ...]; neither tasks nor labels.
      chunk: sets of mixed MLPs in memory at a time.

    Returns:
      [B, d], float32.

    Raises:
      ValueError: if `chunk` is not a positive integer.
    """
    routing.check_chunk(chunk)
    return _gated(state, batch, function=model.features, chunk=chunk)[0]
