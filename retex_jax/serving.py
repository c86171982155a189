"""A released artefact as a predictor: inputs of known or unknown task in, tasks and classes out.

    recovered = Recovered.load("workdirs/demo")
    recovered.warm_up()
    recovered.predict({"image": images})

The merged model runs as far as the identifier's layer, and the identified tasks' experts as `recovery.Recoverer`
plans. Inputs go in batches whose sizes are powers of two: once these are compiled, nothing is compiled again,
whichever tasks the inputs are of. Only the backbone's configuration is needed beside the artefact, and the
tokenizer for texts: no weights, no data of any task.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from retex_jax import data, experiment, models, recovery, release, tree
from retex_jax.pretrained import Encode
from retex_jax.recovery.planning import bucket
from retex_jax.typing import Batch

Inputs = Batch | Sequence[str]
"""Arrays by name, as the model reads them, or texts."""

# The multiple of tokens that `data.trim` cuts texts to.
_LENGTH_STEP = 16


class Prediction(NamedTuple):
    """What is predicted for one input.

    Attributes:
      task: name of the given or identified task.
      label: index of the largest logit; of a regression 0, as its number is the only one of `logits`.
      class_name: of that label; None where the artefact does not name the task's classes.
      logits: of the task's head, [num_classes], float32.
    """

    task: str
    label: int
    class_name: str | None
    logits: np.ndarray


class Recovered:
    """A merged model whose experts are recovered as inputs need them; may be used by several threads.

    Attributes:
      model: Linen module of the backbone.
      released: the artefact.
      encode: texts to arrays, or None.
      max_batch: the largest batch, a power of two.
      recoverer: what runs the experts.
    """

    def __init__(
        self,
        model: nn.Module,
        released: release.Release,
        *,
        encode: Encode | None = None,
        max_batch: int = 64,
        cache_bytes: int = 2**30,
    ):
        if headless := [name for name, head in released.heads.items() if not head]:
            raise ValueError(
                f"released: {headless} have no heads, as questions are answered by the likelihood of their "
                "answers: see recovery.run_choices with offsets.recover"
            )
        _check_fit(model, released)
        self.model = model
        self.released = released
        self.encode = encode
        self.max_batch = max_batch
        self.recoverer = recovery.Recoverer(
            model, released.state, max_batch=max_batch, cache_bytes=cache_bytes
        )
        self._reads = tuple(model.example_batch())

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        max_batch: int = 64,
        cache_bytes: int = 2**30,
        offline: bool = False,
    ) -> "Recovered":
        """Opens an artefact.

        Args:
          directory: with artifact.safetensors and manifest.json.
          max_batch: the largest batch, a power of two.
          cache_bytes: what recovered experts may take in memory together.
          offline: whether nothing may be downloaded (a tokenizer, configurations of snapshots).

        Returns:
          The predictor.

        Raises:
          FileNotFoundError: if there is no artefact.
          ValueError: if it is damaged, is no release or does not fit its model; as `experiment.build_model`.
        """
        released = release.load(directory)
        settings = released.metadata["settings"]
        model = experiment.build_model(settings, offline=offline)
        encode = experiment.load_encoder(settings, model, offline=offline)
        return cls(model, released, encode=encode, max_batch=max_batch, cache_bytes=cache_bytes)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order of their ids."""
        return tuple(self.released.heads)

    def identify(self, batch: Inputs) -> list[str]:
        """The task of each input, by the merged model's features; the merged model stops at their layer.

        Args:
          batch: arrays [n, ...] by name, or n texts.

        Returns:
          n task names.

        Raises:
          ValueError: as `predict`.
        """
        return [self.tasks[task] for task in self._identify(self._arrays(batch))]

    def predict(
        self,
        batch: Inputs,
        task: str | Sequence[str] | None = None,
        *,
        mode: recovery.Mode = "auto",
    ) -> list[Prediction]:
        """Predicts the class of each input by its task's expert and head.

        Args:
          batch: arrays [n, ...] by name, or n texts.
          task: name of the task of all inputs, or n names, one an input; identified when not given.
          mode: how the experts are recovered; see `recovery.modes`.

        Returns:
          n predictions.

        Raises:
          ValueError: if an array that the model reads is missing, arrays differ in length, texts cannot be
            encoded, or a task is unknown.
        """
        inputs = self._arrays(batch)
        size = len(next(iter(inputs.values())))
        ids = self._identify(inputs) if task is None else self._ids(task, size)
        features = self.recoverer.features(inputs, ids, mode)
        predictions = []
        for rows, padded in self._padded(size):
            some = features[padded]
            logits = {
                int(own): recovery.logits(self.released.heads[self.tasks[own]], some)
                for own in np.unique(ids[rows])
            }
            predictions += [
                self._prediction(int(ids[row]), logits[int(ids[row])][place])
                for place, row in enumerate(rows)
            ]
        return predictions

    def warm_up(self, *, max_length: int | None = None, experts: bool = True) -> None:
        """Compiles what prediction needs, for every size of a batch, so that no later call waits for it.

        Args:
          max_length: of texts, the longest that will come, in tokens; what they are encoded to when not given. All
            lengths that batches of encoded texts are cut to are compiled, up to it.
          experts: whether to recover experts too, in the order of the tasks, as many as the cache holds.
        """
        factorable = self.recoverer.is_factorable
        modes: tuple[recovery.Mode, ...] = (
            ("factored", "materialized") if factorable else ("materialized",)
        )
        size = 1
        while size <= self.max_batch:
            for example in self._examples(max_length):
                inputs = {
                    name: np.repeat(np.asarray(array), size, axis=0)
                    for name, array in example.items()
                }
                self._identify(inputs)
                ids = np.zeros(size, np.int32)
                for mode in modes:
                    features = self.recoverer.features(inputs, ids, mode)
                if factorable:
                    self.recoverer.costs(inputs)
            for head in self.released.heads.values():
                recovery.logits(head, features)
            size *= 2
        if experts:
            self.recoverer.materialize()

    def _examples(self, max_length: int | None) -> Iterator[dict[str, np.ndarray]]:
        """One input of every shape that a batch may have."""
        example = {name: np.asarray(array) for name, array in self.model.example_batch().items()}
        if "attention_mask" not in example:
            yield example
            return
        full = getattr(self.encode, "max_length", self.model.config.max_length)
        ends = range(_LENGTH_STEP, (max_length or full) + _LENGTH_STEP, _LENGTH_STEP)
        for length in sorted({min(full, end) for end in ends}):
            yield {name: np.repeat(array, length, axis=1) for name, array in example.items()}

    def _identify(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        state, identifier = self.released.state, self.released.identifier
        size = len(next(iter(inputs.values())))
        ids = np.zeros(size, np.int32)
        for rows, padded in self._padded(size):
            some = data.materialize(data.take(inputs, padded))
            found = recovery.identify(
                self.model, state.merged, identifier, some, len(padded), self.recoverer.expert
            )
            ids[rows] = found[: len(rows)]
        return ids

    def _padded(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows of each batch, and the same with the last repeated up to a batch's size."""
        for start in range(0, size, self.max_batch):
            rows = np.arange(start, min(start + self.max_batch, size))
            missing = bucket(len(rows), self.max_batch) - len(rows)
            yield rows, np.pad(rows, (0, missing), mode="edge")

    def _prediction(self, task: int, logits: np.ndarray) -> Prediction:
        name, label = self.tasks[task], int(logits.argmax())
        classes = self.released.metadata.get("classes", {}).get(name)
        return Prediction(name, label, classes[label] if classes else None, logits)

    def _arrays(self, batch: Inputs) -> dict[str, np.ndarray]:
        if not isinstance(batch, Mapping):
            if self.encode is None:
                raise ValueError(f"batch: got texts, expected arrays {list(self._reads)}")
            if isinstance(batch, str):
                raise ValueError("batch: got one text, expected a sequence of texts")
            batch = self.encode(list(batch))
        if missing := [name for name in self._reads if name not in batch]:
            raise ValueError(f"batch: the model reads {missing}, got {sorted(batch)}")
        inputs = data.as_arrays({name: batch[name] for name in self._reads})
        lengths = {name: len(array) for name, array in inputs.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"batch: expected arrays of one length, got {lengths}")
        return inputs

    def _ids(self, task: str | Sequence[str], size: int) -> np.ndarray:
        names = [task] * size if isinstance(task, str) else list(task)
        if len(names) != size:
            raise ValueError(
                f"task: got {len(names)} names, expected one for each of {size} inputs"
            )
        for name in names:
            if name not in self.tasks:
                hint = tree.did_you_mean(name, self.tasks)
                raise ValueError(f"task: got {name!r}, expected one of {list(self.tasks)}{hint}")
        return np.array([self.tasks.index(name) for name in names], np.int32)


def _check_fit(model: nn.Module, released: release.Release) -> None:
    expected = tree.flatten(models.expected_params(model))
    merged = tree.flatten(released.state.merged)
    problems = [f"{name}: missing" for name in expected.keys() - merged.keys()]
    problems += [f"{name}: not in the model" for name in merged.keys() - expected.keys()]
    problems += [
        f"{name}: {jnp.shape(merged[name])}, expected {expected[name].shape}"
        for name in expected.keys() & merged.keys()
        if jnp.shape(merged[name]) != expected[name].shape
    ]
    if problems:
        raise ValueError("released: it does not fit the model:\n  " + "\n  ".join(sorted(problems)))
