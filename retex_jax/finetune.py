"""Fine-tunes one expert a task from a pretrained model.

    python -m retex_jax.finetune --config=configs/demo.py

A linear head a task, which is never merged, is first fitted to the frozen pretrained features (the linear probe, whose
accuracy is the floor that the expert must beat); then head and backbone are trained together (arXiv:2202.10054) by
AdamW with linear warm-up and cosine decay. Each expert is written as TASK.safetensors (backbone leaves and head/kernel,
head/bias) with a TASK.json beside it. Experts that exist are kept; an interrupted one goes on from its last checkpoint
and ends bitwise equal to an uninterrupted run. --dry_run only checks, as `retex_jax.train` does.

    python -m retex_jax.finetune --config=configs/finetune_clip.py --config.task=sun397

is for one expert of a Hugging Face snapshot: see `retex_jax.finetune_snapshot`.
"""

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from retex_jax import (
    artifact,
    command_line,
    data,
    estimate,
    experiment,
    files,
    finetune_snapshot,
    logging,
    metrics,
    preflight,
    probe,
    recovery,
    training,
    tree,
)
from retex_jax.pretrained import Backbone
from retex_jax.typing import Batch, Params

PRETRAINED = "pretrained"
_SET = "experts.json"
_UNFINISHED = ".unfinished"


class TrainState(NamedTuple):
    """Everything that a step changes: {"backbone", "head"} parameters and the optimiser's state."""

    params: Params
    opt_state: Any


def make_optimizer(
    *,
    learning_rate: float,
    head_learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    steps: int,
) -> optax.GradientTransformation:
    """AdamW whose backbone and head have learning rates of their own.

    Args:
      learning_rate: peak, of the backbone.
      head_learning_rate: peak, of the head.
      weight_decay: decoupled, on leaves of two or more axes.
      warmup_steps: of linear warm-up from 0, part of `steps`; cosine decay to 0 follows.
      steps: of the whole run.

    Returns:
      The transformation, for parameters {"backbone": ..., "head": ...}.
    """

    def adamw(peak: float) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps, 0.0)
        return optax.adamw(
            schedule,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {"backbone": adamw(learning_rate), "head": adamw(head_learning_rate)},
            {"backbone": "backbone", "head": "head"},
        ),
    )


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    model: Any, settings: tuple[tuple[str, float], ...], state: TrainState, batch: Batch
) -> tuple[TrainState, jax.Array]:
    """One step of AdamW on the mean loss of a batch; see `probe.mean_loss`.

    Args:
      model: Linen module.
      settings: keywords of `make_optimizer` as pairs, so that they can be a static argument.
      state: donated.
      batch: input arrays [B, ...] and "label" [B], of a float dtype for a regression.

    Returns:
      The next state and the loss.
    """

    def loss_fn(params: Params) -> jax.Array:
        features = model.apply({"params": params["backbone"]}, batch).pooled
        logits = features @ params["head"]["kernel"] + params["head"]["bias"]
        return probe.mean_loss(logits, batch["label"])

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = make_optimizer(**dict(settings)).update(
        gradients, state.opt_state, state.params
    )
    return TrainState(optax.apply_updates(state.params, updates), opt_state), loss


def finetune(
    backbone: Backbone,
    task: data.Task,
    directory: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    head_learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    checkpoint_every: int,
    seed: int,
) -> dict[str, Any]:
    """Fine-tunes one expert and writes it.

    Args:
      backbone: the pretrained model.
      task: with splits "train", "val" and "test".
      directory: receives TASK.safetensors and TASK.json; checkpoints lie in .unfinished/TASK until then.
      steps: of AdamW.
      batch_size: B.
      learning_rate: peak, of the backbone.
      head_learning_rate: peak, of the head.
      weight_decay: decoupled.
      warmup_steps: part of `steps`.
      checkpoint_every: steps between two checkpoints.
      seed: of the order of the examples.

    Returns:
      The record that is written to TASK.json.

    Raises:
      FloatingPointError: if the loss is not finite, with the step.
      Preempted: after a SIGTERM, when the step that is under way is saved; it ends the program.
    """
    started = time.perf_counter()
    model, train = backbone.model, task.splits["train"]
    settings = {
        "learning_rate": learning_rate,
        "head_learning_rate": head_learning_rate,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
        "steps": steps,
    }
    with logging.progress(1, f"linear probe {task.name}"):
        head, probe_accuracy = linear_probe(backbone, task, batch_size)
    # Copied: the step donates its state, and the pretrained model is needed again.
    params = {"backbone": jax.tree.map(jnp.copy, backbone.params), "head": head}
    state = TrainState(params, make_optimizer(**settings).init(params))
    unfinished = directory / _UNFINISHED / task.name

    def read(step: int) -> dict[str, np.ndarray]:
        indices = data.batch_indices(len(train["label"]), batch_size, step, seed)
        return data.trim(data.materialize(data.take(train, indices)))

    state = training.run(
        task.name,
        partial(train_step, model, tuple(settings.items())),
        state,
        read,
        unfinished,
        steps=steps,
        checkpoint_every=checkpoint_every,
        learning_rate=learning_rate,
    )
    params = jax.device_get(state.params)
    record = {
        "task": task.name,
        "classes": list(task.classes),
        "source": task.source,
        "licence": task.licence,
        "pretrained": backbone.source,
        "examples": {name: len(split["label"]) for name, split in task.splits.items()},
        "accuracy": _accuracies(model, params, task, batch_size),
        "linear_probe": probe_accuracy,
        "seconds": time.perf_counter() - started,
    }
    tensors = {**tree.flatten(params["backbone"]), **tree.flatten({"head": params["head"]})}
    path = directory / f"{task.name}.safetensors"
    artifact.save_safetensors(path, tensors)
    record["file_sha256"] = files.file_hash(path)
    record["sha256"] = files.json_hash(record)
    artifact.write_json(directory / f"{task.name}.json", record)
    _clear(unfinished)
    return record


def _clear(unfinished: Path) -> None:
    """Removes the checkpoints of an expert that is finished."""
    shutil.rmtree(unfinished, ignore_errors=True)
    with contextlib.suppress(OSError):  # it does not exist, or holds those of other experts
        unfinished.parent.rmdir()


def linear_probe(
    backbone: Backbone, task: data.Task, batch_size: int
) -> tuple[recovery.Head, dict[str, float]]:
    """Logistic regression on the frozen pretrained features; linear regression where the labels are numbers.

    Returns:
      The head that fine-tuning starts from, which is the most regularised probe: one that fits the training
      data perfectly would leave nothing to learn; and the accuracies on "val" and "test" of the probe that is
      best on "val".
    """
    features = {
        name: recovery.run(backbone.model, backbone.params, split, batch_size)
        for name, split in task.splits.items()
    }
    labels = {name: split["label"] for name, split in task.splits.items()}
    probes = probe.fit_all(features["train"], labels["train"], task.num_outputs)
    best = probe.select(probes, features["val"], labels["val"])._asdict()
    return probes[-1]._asdict(), {
        name: metrics.score(task.metric, recovery.logits(best, features[name]), labels[name])
        for name in ("val", "test")
    }


def _accuracies(model: Any, params: Params, task: data.Task, batch_size: int) -> dict[str, float]:
    result = {}
    for name in ("val", "test"):
        split = task.splits[name]
        features = recovery.run(model, params["backbone"], split, batch_size)
        outputs = recovery.logits(params["head"], features)
        result[name] = metrics.score(task.metric, outputs, split["label"])
        if task.classes:
            balanced = metrics.balanced_accuracy(outputs.argmax(axis=1), split["label"])
            result[f"{name}_balanced"] = balanced
    return result


def build_experts(
    backbone: Backbone,
    tasks: Sequence[data.Task],
    directory: Path,
    settings: Mapping[str, Any],
    *,
    checkpoint_set: str,
) -> dict[str, dict[str, Any]]:
    """Fine-tunes the experts that the directory lacks; writes the pretrained model beside them.

    Args:
      backbone: the pretrained model.
      tasks: one expert each.
      directory: of the expert set; created if missing.
      settings: keywords of `finetune`.
      checkpoint_set: identifies the experts; a directory holds one set.

    Returns:
      Task name to the record of its expert.

    Raises:
      ValueError: if the directory holds another checkpoint set.
      RuntimeError: if another run is making experts in it.
    """
    _check_set(directory, checkpoint_set)
    names = [task.name for task in tasks]
    if experiment.missing_experts(directory, names):
        directory.mkdir(parents=True, exist_ok=True)
        with logging.WorkdirLock(directory):
            _check_set(directory, checkpoint_set)
            artifact.write_json(directory / _SET, {"checkpoint_set": checkpoint_set})
            path = directory / f"{PRETRAINED}.safetensors"
            if not path.is_file():
                artifact.save_safetensors(path, tree.flatten(backbone.params))
            for task in tasks:
                if experiment.missing_experts(directory, [task.name]):
                    finetune(backbone, task, directory, **settings)
    for name in names:
        _clear(directory / _UNFINISHED / name)
    return {name: _read_record(directory, name) for name in names}


def _read_record(directory: Path, name: str) -> dict[str, Any]:
    """The record of an expert, whose file is compared with it.

    Raises:
      ValueError: if one of the two is damaged, or the expert is missing.
    """
    path, expert = directory / f"{name}.json", directory / f"{name}.safetensors"
    remedy = f"remove {path} to have the expert made again"
    try:
        record = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if not isinstance(record, dict) or not {"accuracy", "linear_probe"} <= record.keys():
        raise ValueError(f"{path} is not the record of an expert; {remedy}")
    own = {key: value for key, value in record.items() if key != "sha256"}
    if "sha256" not in record:  # of before there were hashes
        return record
    if record["sha256"] != files.json_hash(own):
        raise ValueError(f"{path} is damaged: its content hash is wrong; {remedy}")
    if not expert.is_file() or files.file_hash(expert) != record["file_sha256"]:
        raise ValueError(f"{expert} is missing, or has changed since it was written; {remedy}")
    return record


def _check_set(directory: Path, checkpoint_set: str) -> None:
    path = directory / _SET
    if path.is_file() and (there := files.read_json(path)) != {"checkpoint_set": checkpoint_set}:
        found = there.get("checkpoint_set") if isinstance(there, dict) else there
        raise ValueError(
            f"experts.root: {directory} holds the experts of {found}, "
            f"expected {checkpoint_set}; choose another folder"
        )


def dry_run(settings: experiment.Settings) -> NoReturn:
    """Checks without downloading or running anything, and says what it takes; exits with 1 if it cannot run."""
    if "task" in settings:
        problems, takes = finetune_snapshot.problems(settings), estimate.training_lines(settings)
        command_line.end_dry_run(problems, [], takes)
    takes = [] if preflight.lacking(settings) else estimate.lines(settings)
    command_line.end_dry_run(preflight.missing(settings), preflight.downloads(settings), takes)


def main() -> None:
    """Fine-tunes the experts of the experiment file that are missing, and prints what they reach."""
    settings = command_line.as_dict(_CONFIG.value)
    if _DRY_RUN.value:
        dry_run(settings)
    if "task" in settings:
        logging.info(f"the expert lies in {finetune_snapshot.run(settings)}")
        return
    preflight.check(settings, evaluates=False)
    experiment.start()
    experiment.fetch(settings, announce=logging.info)
    backbone, tasks = experiment.load(settings)
    directory = experiment.experts_directory(settings)
    records = build_experts(
        backbone,
        tasks,
        directory,
        experiment.finetune_settings(settings),
        checkpoint_set=experiment.checkpoint_set(settings),
    )
    logging.table(
        f"experts in {directory}",
        ["task", "classes", "test inputs", "expert", "linear probe", "seconds"],
        [
            [
                name,
                len(record["classes"]),
                record["examples"]["test"],
                record["accuracy"]["test"],
                record["linear_probe"]["test"],
                round(record["seconds"], 1),
            ]
            for name, record in records.items()
        ],
    )


if __name__ == "__main__":
    _CONFIG = command_line.define_config()
    _DRY_RUN = command_line.define_dry_run()
    command_line.run(main, required="config")
