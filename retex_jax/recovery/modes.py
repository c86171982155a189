"""Inputs of mixed tasks through the experts of their tasks, in any of four ways that give the same features.

- "materialized": each task's inputs through its recovered parameters, which are kept for the next call, the
  least recently used forgotten first.
- "grouped": the same without keeping them (ReTeX, arXiv:2606.26902, section 5.3).
- "sample_wise": each input through parameters that are recovered for it alone (the paper's first way).
- "factored": all inputs through the merged model at once, each with its own task's factors; no parameters are
  made. See `retex_jax.recovery.factored`.
- "auto": by counts and bytes, "factored" or what is cheaper; see `retex_jax.recovery.planning`. A model that is
  stacked for scan=True has no factors, so that it is never "factored".

Inputs of no known task have mixtures of experts instead (`Recoverer.mixed_features`), which are applied in factors.

Batches have powers of two as sizes, and texts of a batch are cut alike (`data.trim`), so that few programs are
compiled; none depends on which tasks a batch holds.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import numpy as np

from retex_jax import data, models, offsets, tree
from retex_jax.offsets import FitReport, OffsetState
from retex_jax.recovery import planning
from retex_jax.recovery.factored import Factored, apply, prepare, stacked_leaves
from retex_jax.typing import Batch, Params

Examples = Mapping[str, np.ndarray]
Mode = Literal["auto", "factored", "materialized", "grouped", "sample_wise"]
MODES: tuple[Mode, ...] = get_args(Mode)

_SAMPLES = 4


class Recoverer:
    """A merged model and its offsets, ready for inputs of mixed tasks; may be used by several threads.

    Attributes:
      model: Linen module.
      state: merged model and offsets, without the report of their fit.
      max_batch: the largest batch, a power of two.
      is_factorable: whether inputs may be "factored", and have mixtures: not if the model is stacked for scan=True.
    """

    def __init__(
        self,
        model: nn.Module,
        state: OffsetState,
        *,
        max_batch: int = 64,
        cache_bytes: int = 2**30,
    ):
        if max_batch < 1 or max_batch & (max_batch - 1):
            raise ValueError(f"max_batch: got {max_batch}, expected a power of two")
        if cache_bytes < 0:
            raise ValueError(f"cache_bytes: got {cache_bytes}, expected at least 0")
        self.model = model
        self.state = replace(state, report=FitReport({}, {}, {}, {}))
        self.max_batch = max_batch
        self.is_factorable = not stacked_leaves(state.merged)
        self._reads = tuple(model.example_batch())
        self._experts = ParamsCache(cache_bytes)
        self._fits = tree.param_bytes(state.merged) <= cache_bytes
        self._lock = threading.RLock()
        self._factored: Factored | None = None
        self._costs: dict[Any, planning.Costs] = {}

    def features(self, examples: Examples, task_ids: np.ndarray, mode: Mode = "auto") -> np.ndarray:
        """Runs each example through the expert of its task.

        Args:
          examples: input arrays [n, ...]; what the model does not read is left out.
          task_ids: [n], integers, 0 to T - 1, in any order.
          mode: see the module's docstring.

        Returns:
          Pooled features [n, d], float32, in the order of the examples.

        Raises:
          ValueError: if the mode is unknown, or the task ids are no integers [n] from 0 to T - 1.
        """
        inputs = data.as_arrays(self._inputs(examples))
        ids = self._checked(inputs, task_ids, mode)
        if mode == "auto":
            mode = self.plan(inputs, ids)
        if mode == "factored":
            return self._run(partial(_factored, self.model, self.factored), inputs, ids)
        if mode == "sample_wise":
            return self._run(partial(_sample_wise, self.model, self.state), inputs, ids)
        recover = self.expert if mode == "materialized" else self._recover
        features = np.empty((len(ids), self.model.config.feature_dim), np.float32)
        for task in np.unique(ids):
            members = np.flatnonzero(ids == task)
            run = partial(_plain, self.model, recover(int(task)))
            features[members] = self._run(run, data.take(inputs, members), ids[members])
        return features

    def mixed_features(self, examples: Examples, weights: np.ndarray) -> np.ndarray:
        """Runs each example through its own mixture of the experts, as `offsets.mix` has it.

        Args:
          examples: input arrays [n, ...]; what the model does not read is left out.
          weights: over tasks, [n, T], float, rows of sum 1; see `retex_jax.identifier.weights`.

        Returns:
          Pooled features [n, d], float32, in the order of the examples.

        Raises:
          ValueError: if the weights are not [n, T], are not finite, or a row does not sum to 1.
        """
        inputs = data.as_arrays(self._inputs(examples))
        weights = np.asarray(weights, np.float32)
        count = len(next(iter(inputs.values())))
        if weights.shape != (count, self.state.num_tasks):
            raise ValueError(
                f"weights: got shape {weights.shape}, expected {(count, self.state.num_tasks)}"
            )
        sums = weights.sum(axis=1)
        if not np.allclose(sums, 1, atol=1e-3):
            row = int(np.flatnonzero(~np.isclose(sums, 1, atol=1e-3))[0])
            raise ValueError(f"weights: got row {row} of sum {sums[row]}, expected rows of sum 1")
        return self._run(partial(_factored, self.model, self.factored), inputs, weights)

    def plan(self, examples: Examples, task_ids: np.ndarray) -> Mode:
        """What "auto" does with these examples: "factored", "materialized" or "grouped"."""
        counts = Counter(np.asarray(task_ids).tolist())
        cached = self._experts.keys()
        if len(counts) <= 1 and counts.keys() <= cached:
            return "materialized"
        if self.is_factorable and planning.is_factored_cheaper(
            counts, cached, self.max_batch, self.costs(examples)
        ):
            return "factored"
        return "materialized" if self._fits else "grouped"

    def expert(self, task: int) -> Params:
        """The parameters of a task's expert, recovered unless they are kept."""
        return self._experts.get(task, lambda: self._recover(task))

    def materialize(self) -> None:
        """Recovers experts in the order of their ids and keeps them, as many as the cache holds."""
        fitting = self._experts.limit // tree.param_bytes(self.state.merged)
        for task in range(min(fitting, self.state.num_tasks)):
            self.expert(task)

    def costs(self, examples: Examples) -> planning.Costs:
        """What inputs of the examples' shapes cost; counted once a shape."""
        one = {
            name: jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype)
            for name, array in data.trim(self._inputs(examples)).items()
        }
        key = tuple((name, spec.shape, str(spec.dtype)) for name, spec in one.items())
        with self._lock:
            if key not in self._costs:
                self._costs[key] = planning.costs(self.model, self.factored, one)
            return self._costs[key]

    @property
    def factored(self) -> Factored:
        """The offsets as factors; prepared when first asked for."""
        with self._lock:
            if self._factored is None:
                self._factored = prepare(self.model, self.state)
            return self._factored

    def _inputs(self, examples: Examples) -> Examples:
        return {name: examples[name] for name in self._reads if name in examples}

    def _recover(self, task: int) -> Params:
        return offsets.recover(self.state, task)

    def _run(
        self, program: Callable[..., models.Features], inputs: Examples, tasks: np.ndarray
    ) -> np.ndarray:
        features = np.empty((len(tasks), self.model.config.feature_dim), np.float32)
        for rows, batch, batch_tasks in batches(inputs, tasks, self.max_batch):
            features[rows] = np.asarray(program(batch, batch_tasks).pooled)[: len(rows)]
        return features

    def _checked(self, inputs: Examples, task_ids: np.ndarray, mode: str) -> np.ndarray:
        ids = np.asarray(task_ids)
        lengths = {len(array) for array in inputs.values()}
        problems = []
        if mode not in MODES:
            problems.append(f"mode: got {mode!r}, expected one of {list(MODES)}")
        if lengths != {len(ids)} or ids.ndim != 1:
            problems.append(
                f"task_ids: got shape {ids.shape}, expected one for each of {sorted(lengths)} examples"
            )
        count = self.state.num_tasks
        if len(ids) and not np.issubdtype(ids.dtype, np.integer):
            problems.append(f"task_ids: got dtype {ids.dtype}, expected an integer dtype")
        elif len(ids) and not 0 <= ids.min() <= ids.max() < count:
            problems.append(f"task_ids: got {ids.min()} to {ids.max()}, expected 0 to {count - 1}")
        if problems:
            raise ValueError("\n".join(problems))
        return ids.astype(np.int32)


class ParamsCache:
    """Parameters by task, of at most so many bytes; the least recently used go first. Thread-safe.

    Attributes:
      limit: bytes; what is larger is made, but not kept.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: OrderedDict[int, tuple[Params, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, task: int, make: Callable[[], Params]) -> Params:
        """The parameters of a task; made if they are not kept, one task at a time."""
        with self._lock:
            if task in self._entries:
                self._entries.move_to_end(task)
                return self._entries[task][0]
            params = make()
            size = tree.param_bytes(params)
            if size <= self.limit:
                while self._entries and self._used() + size > self.limit:
                    self._entries.popitem(last=False)
                self._entries[task] = (params, size)
            return params

    def keys(self) -> set[int]:
        """The tasks whose parameters are kept."""
        with self._lock:
            return set(self._entries)

    def _used(self) -> int:
        return sum(size for _, size in self._entries.values())


def batches(
    inputs: Examples, tasks: np.ndarray, max_batch: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]]:
    """Cuts inputs into batches of few shapes, texts of like length side by side; images are decoded ahead.

    Args:
      inputs: arrays [n, ...].
      tasks: [n] or [n, T].
      max_batch: the largest batch.

    Yields:
      (rows, batch, tasks): positions of the inputs; arrays [B, ...] that begin with them and repeat the last up
      to B, a power of two; the tasks [B] or [B, T].
    """
    order = data.by_length(inputs)

    def batch(start: int) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
        rows = order[start : start + max_batch]
        padded = np.pad(rows, (0, planning.bucket(len(rows), max_batch) - len(rows)), mode="edge")
        return rows, data.trim(data.materialize(data.take(inputs, padded))), tasks[padded]

    yield from data.overlapped(inputs, batch, range(0, len(order), max_batch))


@partial(jax.jit, static_argnums=0)
def _plain(model: Any, params: Params, batch: Batch, _: Any) -> models.Features:
    return model.apply({"params": params}, batch)


@partial(jax.jit, static_argnums=0)
def _factored(model: Any, factored: Factored, batch: Batch, tasks: jax.Array) -> models.Features:
    return apply(model, factored, batch, tasks)


@partial(jax.jit, static_argnums=0)
def _sample_wise(
    model: Any, state: OffsetState, batch: Batch, task_ids: jax.Array
) -> models.Features:
    """A few inputs at a time, so that few experts' parameters lie in memory."""

    def one(sample: tuple[Batch, jax.Array]) -> models.Features:
        inputs, task = sample
        params = offsets.recover(state, task)
        features = model.apply({"params": params}, {k: v[None] for k, v in inputs.items()})
        return models.Features(features.pooled[0], features.layers[:, 0])

    return jax.lax.map(one, (batch, task_ids), batch_size=min(_SAMPLES, len(task_ids)))
