"""How models are evaluated: with the task known, and under the two protocols of an unknown task.

With the head known, only the backbone is routed by the identifier, as the papers seem to evaluate; with nothing
known, the identified task's head predicts, and a wrong task counts as wrong. Inputs of unknown task come in
shuffled batches of all tasks, and nothing that predicts sees the true task.

Every task is measured by its own metric, which is called accuracy throughout. Where a wrong task counts as wrong, the
metric is that of the inputs whose task is identified, times their share: of accuracy, that is the fraction of inputs
that are right in both. Questions bring their answers and need no head: with the head known or not, they are answered
by the identified task's expert.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from retex_jax import data, metrics, offsets, recovery
from retex_jax.typing import Params, ProgressFn


class Suite(NamedTuple):
    """What methods are evaluated on.

    Attributes:
      model: Linen module.
      tasks: with a split "test".
      heads: one a task, and after them those of tasks that are not evaluated.
      individual: task name to the accuracy of the expert itself.
      batch_size: B.
      seed: of the order of mixed inputs.
    """

    model: Any
    tasks: Sequence[data.Task]
    heads: Sequence[recovery.Head]
    individual: Mapping[str, float]
    batch_size: int
    seed: int


class Unknown(NamedTuple):
    """Predictions for inputs of unknown task.

    Attributes:
      task_ids: identified task of each input, [n], int32.
      features: pooled features of the identified task's expert, [n, d], float32; of questions, the scores that it
        gives their answers, [n, C].
      has_choices: whether the inputs are questions.
    """

    task_ids: np.ndarray
    features: np.ndarray
    has_choices: bool = False

    def outputs(self, head: recovery.Head, rows: np.ndarray) -> np.ndarray:
        """What a head makes of some inputs, [m, C]; of questions, the scores of their answers."""
        return (
            self.features[rows] if self.has_choices else recovery.logits(head, self.features[rows])
        )


def known(
    suite: Suite,
    recover: Callable[[int], Params],
    split: str = "test",
    progress: ProgressFn | None = None,
) -> dict[str, float]:
    """Accuracy of each task with its own parameters and its own head.

    Args:
      suite: what to evaluate on.
      recover: task id -> parameters.
      split: of the tasks.
      progress: called with (tasks done, tasks) after each.

    Returns:
      Task name to accuracy.
    """
    result = {}
    for index, task in enumerate(suite.tasks):
        examples = task.splits[split]
        outputs = recovery.outputs(
            suite.model, recover(index), suite.heads[index], examples, suite.batch_size
        )
        result[task.name] = metrics.score(task.metric, outputs, examples["label"])
        if progress:
            progress(index + 1, len(suite.tasks))
    return result


def validation(suite: Suite, num_inputs: int, recover: Callable[[int], Params]) -> Suite:
    """The suite that options are chosen on: it holds validation inputs and nothing else.

    Args:
      suite: whose tasks have a split "val".
      num_inputs: of each task, the first.
      recover: task id -> the expert's own parameters.

    Returns:
      Tasks that have a split "val" only, and `individual` the experts' accuracies on it.
    """
    tasks = [first_inputs(task, num_inputs, "val") for task in suite.tasks]
    size = min(suite.batch_size, max(len(task.splits["val"]["label"]) for task in tasks))
    cut = suite._replace(tasks=tasks, batch_size=size)
    return cut._replace(individual=known(cut, recover, "val"))


def first_tests(suite: Suite, num_inputs: int, recover: Callable[[int], Params]) -> Suite:
    """The suite of a few test inputs.

    Args:
      suite: what methods are evaluated on.
      num_inputs: of each task's test split, the first.
      recover: task id -> the expert's own parameters.

    Returns:
      Tasks that have a split "test" only, and `individual` the experts' accuracies on it: on few inputs they are
      others than on all.
    """
    tasks = [first_inputs(task, num_inputs, "test") for task in suite.tasks]
    cut = suite._replace(tasks=tasks)
    return cut._replace(individual=known(cut, recover))


def mixed_test(tasks: Sequence[data.Task], seed: int) -> dict[str, np.ndarray]:
    """The test inputs of all tasks, shuffled together: input arrays, "label" and "task", [n, ...].

    Labels are float32 where a task is a regression. Texts and answers are filled up to the longest of all tasks.
    """
    return data.mixed(_alike(tasks), "test", seed)


def _alike(tasks: Sequence[data.Task]) -> list[data.Task]:
    """Tasks with a split "test" only, whose arrays have the same dtypes and shapes but for the first axis."""
    splits = [dict(task.splits["test"]) for task in tasks]
    if len({split["label"].dtype for split in splits}) > 1:
        splits = [{**split, "label": split["label"].astype(np.float32)} for split in splits]
    for name in ("input_ids", "attention_mask", *recovery.CHOICES):
        if all(name in split for split in splits):
            joined = data.joined([split[name] for split in splits])
            ends = np.cumsum([len(split[name]) for split in splits])[:-1]
            for split, array in zip(splits, np.split(joined, ends), strict=True):
                split[name] = array
    return [
        replace(task, splits={"test": split}) for task, split in zip(tasks, splits, strict=True)
    ]


def predict_unknown(
    model: Any,
    state: offsets.OffsetState,
    identifier: recovery.Identifier,
    inputs: Mapping[str, np.ndarray],
    batch_size: int,
) -> Unknown:
    """Identifies the task of each input and runs it through that task's recovered expert.

    Args:
      model: Linen module.
      state: merged model and offsets.
      identifier: its state, its layers and its kind; one that needs the experts is given the recovered ones.
      inputs: input arrays [n, ...] only: labels and true tasks have no place here.
      batch_size: B.

    Returns:
      Identified tasks and features, or scores of answers.

    Raises:
      ValueError: if `inputs` carries "task" or "label".
    """
    if leaked := {"task", "label"} & set(inputs):
        raise ValueError(f"inputs: got {sorted(leaked)}, expected nothing but what the model reads")

    def recover(task: int) -> Params:
        return offsets.recover(state, task)

    task_ids = recovery.identify(model, state.merged, identifier, inputs, batch_size, recover)
    if recovery.has_choices(inputs):
        scores = recovery.run_choices_grouped(model, recover, inputs, task_ids, batch_size)
        return Unknown(task_ids, scores, has_choices=True)
    features = recovery.run_grouped(model, recover, inputs, task_ids, batch_size)
    return Unknown(task_ids, features)


def unknown(
    prediction: Unknown,
    heads: Sequence[recovery.Head],
    names: Sequence[str],
    true_tasks: np.ndarray,
    labels: np.ndarray,
    task_metrics: Sequence[str] = (),
) -> tuple[dict[str, float], dict[str, float], np.ndarray]:
    """Scores predictions for inputs of unknown task under both protocols.

    Args:
      prediction: from `predict_unknown`.
      heads: one a task, as a `Suite` has them.
      names: of the tasks.
      true_tasks: [n].
      labels: [n].
      task_metrics: of the tasks; accuracy where there are none.

    Returns:
      Accuracy a task with the head known, accuracy a task with nothing known, and the identification
      confusion matrix [T, T] (row = true task), T being the number of heads.
    """
    head_known, nothing_known = {}, {}
    for task, name in enumerate(names):
        metric = task_metrics[task] if task_metrics else "accuracy"
        rows = np.flatnonzero(true_tasks == task)
        outputs, own_labels = prediction.outputs(heads[task], rows), labels[rows]
        head_known[name] = metrics.score(metric, outputs, own_labels)
        found = prediction.task_ids[rows] == task
        nothing_known[name] = (
            metrics.score(metric, outputs[found], own_labels[found]) * int(found.sum()) / len(rows)
            if found.any()
            else 0.0
        )
    if prediction.has_choices:
        nothing_known = dict(head_known)
    confusion = metrics.confusion_matrix(prediction.task_ids, true_tasks, len(heads))
    return head_known, nothing_known, confusion


def first_inputs(task: data.Task, count: int, split: str) -> data.Task:
    """The task with the first examples of one split only."""
    examples = task.splits[split]
    count = min(count, len(examples["label"]))
    return replace(task, splits={split: data.take(examples, np.arange(count))})
