"""Fine-tunes the vision tower of a CLIP on one task, its zero-shot head frozen, and writes the tower as a snapshot.

So the papers' experts are made (Ilharco et al., arXiv:2212.04089): AdamW, linear warm-up and cosine decay, gradients
cut to a norm of 1, and the head that the text tower makes of the class names, which does not change. A batch lies over
all devices of the machine, and may be taken in parts.

Numerics: parameters, sums of gradients and the optimiser in float32; layers compute in model.options' dtype.
"""

import json
import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from retex_jax import (
    artifact,
    data,
    experiment,
    huggingface,
    logging,
    metrics,
    probe,
    recovery,
    training,
)
from retex_jax.convert import hub
from retex_jax.convert.architectures import ARCHITECTURES
from retex_jax.convert.export import export
from retex_jax.experiment import Settings
from retex_jax.typing import Batch, Params

RECORD = "finetune.json"
_UNFINISHED = ".unfinished"


class State(NamedTuple):
    """Everything that a step changes."""

    params: Params
    opt_state: Any


def make_optimizer(
    *, learning_rate: float, weight_decay: float, warmup_steps: int, steps: int
) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay to 0, after gradients are cut to a global norm of 1.

    Args:
      learning_rate: peak.
      weight_decay: decoupled, on all leaves.
      warmup_steps: of linear warm-up from 0, part of `steps`.
      steps: of the whole run.

    Returns:
      The transformation.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps, 0.0)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay)
    )


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(
    model: Any, params: Params, head: recovery.Head, batch: Batch
) -> tuple[jax.Array, Params]:
    """The mean cross-entropy of a batch, whose parts are taken one after the other, and its gradients.

    Args:
      model: Linen module.
      params: its parameters.
      head: frozen.
      batch: input arrays [A, B / A, ...] and "label" [A, B / A]: A parts.

    Returns:
      The loss, float32, and the gradients, as the parameters.
    """

    def loss_fn(params: Params, part: Batch) -> jax.Array:
        features = model.apply({"params": params}, part).pooled.astype(jnp.float32)
        return probe.mean_loss(jnp.asarray(recovery.apply_head(head, features)), part["label"])

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, part)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, batch)
    return jax.tree.map(lambda x: x / len(batch["label"]), total)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    model: Any,
    settings: tuple[tuple[str, float], ...],
    state: State,
    head: recovery.Head,
    batch: Batch,
) -> tuple[State, jax.Array]:
    """One step of `make_optimizer`.

    Args:
      model: Linen module.
      settings: keywords of `make_optimizer` as pairs, so that they can be a static argument.
      state: donated.
      head: frozen.
      batch: as for `loss_and_gradients`.

    Returns:
      The next state and the loss.
    """
    loss, gradients = loss_and_gradients(model, state.params, head, batch)
    updates, opt_state = make_optimizer(**dict(settings)).update(
        gradients, state.opt_state, state.params
    )
    return State(optax.apply_updates(state.params, updates), opt_state), loss


def finetune(
    model: Any,
    params: Params,
    head: recovery.Head,
    task: data.Task,
    unfinished: Path,
    *,
    steps: int,
    batch_size: int,
    accumulate: int,
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    checkpoint_every: int,
    seed: int,
) -> Params:
    """Fine-tunes a model on a task; a run that was interrupted goes on where it was.

    Args:
      model: Linen module.
      params: pretrained; kept as they are.
      head: frozen.
      task: with a split "train".
      unfinished: the folder of the checkpoints.
      steps: of AdamW.
      batch_size: B, a multiple of `accumulate` times the devices.
      accumulate: parts of a batch that are taken one after the other.
      learning_rate: peak.
      weight_decay: decoupled.
      warmup_steps: part of `steps`.
      checkpoint_every: steps between two checkpoints.
      seed: of the order of the examples.

    Returns:
      The fine-tuned parameters, on the host.

    Raises:
      FloatingPointError: if the loss is not finite, with the step.
      Preempted: after a SIGTERM, when the step that is under way is saved; it ends the program.
    """
    settings = {
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
        "steps": steps,
    }
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))
    # Copied: the step donates its state.
    own = jax.tree.map(jnp.array, params)
    state = jax.device_put(State(own, make_optimizer(**settings).init(own)), everywhere)
    head = jax.device_put(head, everywhere)
    train = task.splits["train"]

    def read(step: int) -> dict[str, np.ndarray]:
        indices = data.batch_indices(len(train["label"]), batch_size, step, seed)
        batch = data.materialize(data.take(train, indices))
        return {name: x.reshape(accumulate, -1, *x.shape[1:]) for name, x in batch.items()}

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        batch = jax.device_put(batch, divided)
        return train_step(model, tuple(settings.items()), state, head, batch)

    state = training.run(
        task.name,
        step,
        state,
        read,
        unfinished,
        steps=steps,
        checkpoint_every=checkpoint_every,
        learning_rate=learning_rate,
    )
    return jax.device_get(state.params)


def problems(settings: Settings) -> list[str]:
    """Everything that would stop `run` later; nothing is downloaded."""
    name, spec = settings["task"], settings["finetune"]
    found = []
    try:
        data.check_names([name])
        if name not in {**data.DATA_SETS, **data.VISION_TASKS}:
            found.append(f"task: got {name!r}, expected a task of images")
    except ValueError as error:
        found.append(f"task: {error}")
    found += data.data_set_problems(name, settings["data_sets"]["root"])
    for entry in ("steps", "batch_size", "accumulate", "checkpoint_every"):
        if spec[entry] < 1:
            found.append(f"finetune.{entry}: got {spec[entry]}, expected 1 or more")
    if not 0 < spec["learning_rate"] < float("inf"):
        found.append(f"finetune.learning_rate: got {spec['learning_rate']}, expected above 0")
    if not 0 <= spec["warmup_steps"] < max(spec["steps"], 1):
        found.append(
            f"finetune.warmup_steps: got {spec['warmup_steps']}, expected 0 to {spec['steps'] - 1}"
        )
    parts = max(spec["accumulate"], 1) * jax.device_count()
    if spec["batch_size"] % parts:
        found.append(
            f"finetune.batch_size: got {spec['batch_size']}, expected a multiple of finetune.accumulate "
            f"times the {jax.device_count()} devices"
        )
    if not settings["experts"]["root"]:
        found.append("experts.root: got '', expected the folder that receives the expert")
    try:
        huggingface.build_model(_located(settings, offline=True), settings["model"]["options"])
    except (ValueError, OSError) as error:
        found += [f"experts: {line.strip()}" for line in str(error).splitlines()]
    return found


def run(settings: Settings) -> Path:
    """Fine-tunes the expert of settings["task"] and writes it as a CLIPVisionModel, which configurations name.

    Args:
      settings: as configs/finetune_clip.py.

    Returns:
      The folder, ROOT/own/PRETRAINED_TASK; what lies there already, whole, is not made again.

    Raises:
      ValueError: if the settings cannot run (all problems are listed), or the folder was begun with others.
      FloatingPointError: if the loss is not finite.
      RuntimeError: if another run makes the same expert.
    """
    if found := problems(settings):
        raise ValueError(f"{settings['name']!r} cannot run as it is:\n  " + "\n  ".join(found))
    experiment.start()
    spec, name = dict(settings["finetune"]), settings["task"]
    located = _located(settings, offline=True)
    base = Path(settings["experts"]["pretrained"]).name
    folder = Path(settings["experts"]["root"], "own", f"{base}_{name}")
    if (folder / RECORD).is_file():
        return folder
    with logging.WorkdirLock(folder):
        _check_begun(folder / _UNFINISHED / "settings.json", settings)
        started = time.perf_counter()
        backbone = huggingface.load_backbone(located, settings["model"]["options"])
        task = data.load_task(
            name,
            image_size=backbone.model.config.image_size,
            root=settings["data_sets"]["root"],
            **settings["data"],
        )
        head = huggingface.zero_shot_heads(located.pretrained, [task], ())[name]
        unfinished = folder / _UNFINISHED / "steps"
        params = finetune(
            backbone.model, backbone.params, head, task, unfinished, seed=settings["seed"], **spec
        )
        size = settings["evaluate"]["batch_size"]
        accuracy = {
            when: _accuracies(backbone.model, own, head, task, size)
            for when, own in (("zero_shot", backbone.params), ("fine_tuned", params))
        }
        export(folder, backbone.model, params, ARCHITECTURES["CLIPVisionModel"])
        record = {
            "settings": settings,
            "classes": list(task.classes),
            "source": task.source,
            "licence": task.licence,
            "pretrained": backbone.source,
            "examples": {split: len(arrays["label"]) for split, arrays in task.splits.items()},
            "accuracy": accuracy,
            "seconds": time.perf_counter() - started,
        }
        artifact.write_json(folder / RECORD, record)
        shutil.rmtree(folder / _UNFINISHED)
    logging.table(
        f"expert in {folder}",
        ["task", "classes", "test inputs", "expert", "zero-shot", "seconds"],
        [
            [
                name,
                task.num_classes,
                record["examples"]["test"],
                accuracy["fine_tuned"]["test"],
                accuracy["zero_shot"]["test"],
                round(record["seconds"], 1),
            ]
        ],
    )
    return folder


def _located(settings: Mapping[str, Any], *, offline: bool) -> huggingface.Located:
    """The pretrained CLIP as backbone, and as what is fine-tuned."""
    spec = settings["experts"]
    name = spec["pretrained"]
    folder = hub.find(name, spec["root"], spec["revisions"].get(name), offline)
    return huggingface.Located(folder, {settings["task"]: folder})


def _accuracies(
    model: Any, params: Params, head: recovery.Head, task: data.Task, batch_size: int
) -> dict[str, float]:
    result = {}
    for split in ("val", "test"):
        examples = task.splits[split]
        outputs = recovery.outputs(model, params, head, examples, batch_size)
        result[split] = metrics.score(task.metric, outputs, examples["label"])
    return result


def _check_begun(path: Path, settings: Settings) -> None:
    """Makes sure that checkpoints are of these settings."""
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{path.parent}: begun with other settings; remove it, or give those")
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_json(path, settings)
