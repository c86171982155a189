"""What a run or the fine-tuning of an expert takes, from shapes alone: bytes on disk, memory, time. For --dry_run.

Nothing is read, and no model is allocated. A forward pass is counted as its matrix products: two operations a weight
and token, and the products of attention. Texts count at their full length. Time is what these take at the rate of a
matrix product, which is timed; reading, decoding, solving and writing come on top. The memory is that of one device,
as the programs put a model on one.
"""

import time
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retex_jax import data, experiment, finetune_snapshot, finetune_steps, models, tree
from retex_jax.experiment import Settings
from retex_jax.offsets.state import plan_leaves

_KNOWN = {
    **{
        f"openai/clip-vit-{name}": models.ViT(replace(config, projection_dim=None))
        for name, config in (
            ("base-patch32", models.CLIP_B32),
            ("base-patch16", models.CLIP_B16),
            ("large-patch14", models.CLIP_L14),
        )
    },
    "FacebookAI/roberta-base": models.Bert(models.ROBERTA_BASE),
    "openai-community/gpt2": models.Gpt2(models.GPT2),
    "Qwen/Qwen-14B": models.Decoder(models.QWEN_14B),
}
"""The models of public repositories, for when their snapshots are not here yet."""

_SOLVER_BYTES = 8  # an entry of a leaf that is solved, in float64
_TRAINED = 3  # forward passes that a training step takes


class Estimate(NamedTuple):
    """What a run takes.

    Attributes:
      num_params: of one model.
      model_bytes: of one model.
      expert_bytes: of the pretrained model and all experts, on disk.
      artifact_bytes: of merged model and offsets, on disk.
      device_bytes: memory of the device, the most at any time.
      flops: floating-point operations of all passes.
      unsized: tasks whose number of test inputs is not known; they are not in `flops`.
    """

    num_params: int
    model_bytes: int
    expert_bytes: int
    artifact_bytes: int
    device_bytes: int
    flops: float
    unsized: tuple[str, ...]


def estimate(settings: Settings) -> Estimate:
    """Estimates a run of `retex_jax.train`.

    Raises:
      ValueError: if there is no snapshot to tell the model by, or settings are out of range.
    """
    spec = settings["finetune"]
    counts = spec["steps"], spec["batch_size"], settings["evaluate"]["batch_size"]
    _check_counts(*counts, settings["identifier"]["num_calibration"])
    model = build_model(settings)
    leaves = dict(_leaves(model))
    num_tasks, length = len(settings["tasks"]), settings["model"]["max_length"]
    model_bytes = tree.param_bytes(leaves)
    offsets = offset_bytes(settings, leaves)
    block = block_bytes(model, length)
    # Merged model, offsets and a recovered expert, besides the last method's model.
    batch = block * settings["evaluate"]["batch_size"]
    solved = max(leaf.size for leaf in leaves.values()) * (num_tasks + 1) * _SOLVER_BYTES
    device_bytes = 3 * model_bytes + offsets + max(batch, solved)

    sizes = {name: num_test(settings, name) for name in settings["tasks"]}
    known = 2 + len(settings["baselines"]) + len(settings["offsets"]["extra_ranks"])
    inputs = (known + 2) * sum(size or 0 for size in sizes.values())
    inputs += num_tasks * settings["identifier"]["num_calibration"]
    if missing := _experts_to_make(settings):
        inputs += _TRAINED * missing * spec["steps"] * spec["batch_size"]
        kept = block * model.config.num_layers * spec["batch_size"]
        device_bytes = max(device_bytes, 4 * model_bytes + kept)
    return Estimate(
        sum(leaf.size for leaf in leaves.values()),
        model_bytes,
        (num_tasks + 1) * model_bytes,
        model_bytes + offsets,
        device_bytes,
        float(inputs * forward_flops(model, length)),
        tuple(name for name, size in sizes.items() if size is None),
    )


def lines(settings: Settings) -> list[str]:
    """`estimate` in words, with what this machine does a second; one line each."""
    try:
        found = estimate(settings)
    except (ValueError, OSError):
        return ["what it takes can be estimated when the model is known and the settings are right"]
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    has = f", which has {_bytes(limit)}" if limit else ""
    model = build_model(settings)
    rate = matmul_rate(next(iter(_leaves(model).values())).dtype)
    length = "" if "image" in model.example_batch() else ", texts at full length"
    without = f", without {', '.join(found.unsized)}" if found.unsized else ""
    return [
        f"model: {found.num_params:,} parameters, {_bytes(found.model_bytes)}",
        f"disk: {_bytes(found.expert_bytes)} of pretrained model and experts, "
        f"{_bytes(found.artifact_bytes)} of the released artefact",
        f"memory: about {_bytes(found.device_bytes)} on one device ({device.device_kind}{has})",
        f"time: {_duration(found.flops / rate)} for {found.flops:.1e} operations of the model{length}{without}, "
        f"at {rate:.1e} a second as measured here; reading, decoding and solving come on top",
    ]


def training_lines(settings: Settings) -> list[str]:
    """What the fine-tuning of settings["task"] takes, in words; one line each, of which there may be none."""
    spec, length = settings["finetune"], settings["model"]["max_length"]
    try:
        _check_counts(spec["steps"] or 1, spec["batch_size"])
        model = build_model(settings)
    except (ValueError, OSError):
        return ["what it takes can be estimated when the model is known and the settings are right"]
    leaves, part = _leaves(model), max(1, spec["batch_size"] // max(spec["accumulate"], 1))
    model_bytes = tree.param_bytes(leaves)
    kept = 3 + spec["keep_best"]  # parameters, two moments, and the best parameters
    activations = block_bytes(model, length) * model.config.num_layers * part
    memory = (kept + 1) * model_bytes + activations // jax.device_count()
    steps = num_steps(settings)
    took = f"time: not known, as the training examples of {settings['task']} are not"
    if steps:
        flops = _TRAINED * steps * spec["batch_size"] * forward_flops(model, length)
        rate = matmul_rate(model.config.dtype) * jax.device_count()
        texts = "" if "image" in model.example_batch() else ", texts at full length"
        took = (
            f"time: {_duration(flops / rate)} for {steps:,} steps, {flops:.1e} operations of the model{texts}, at "
            f"{rate:.1e} a second as measured here; reading, decoding and evaluation come on top"
        )
    return [
        f"model: {sum(leaf.size for leaf in leaves.values()):,} parameters, {_bytes(model_bytes)}",
        f"disk: {_bytes(2 * model_bytes)} of pretrained model and expert, {_bytes(kept * model_bytes)} of checkpoints",
        f"memory: about {_bytes(memory)} on each of {jax.device_count()} devices "
        f"({jax.devices()[0].device_kind})",
        took,
    ]


def num_steps(settings: Settings) -> int | None:
    """Steps of the fine-tuning of settings["task"]; None where the size of its training set is needed and not known."""
    spec = settings["finetune"]
    examples = data.num_train(settings["task"])
    if not spec["steps"] and examples is None:
        return None
    return finetune_steps.length(examples or 0, spec["batch_size"], spec["steps"], spec["epochs"])


def _check_counts(*counts: int) -> None:
    if min(counts) < 1:
        raise ValueError(f"steps, batch sizes and inputs: got {counts}, expected 1 or more of each")


def build_model(settings: Settings) -> Any:
    """The module of an experiment; where its snapshots are missing, that of a known repository.

    Raises:
      ValueError: if there is no snapshot, and the repository is not known.
    """
    try:
        if "task" in settings:
            return finetune_snapshot.build_model(settings)
        return experiment.build_model(settings, offline=True)
    except (ValueError, OSError):
        name = settings["experts"]["pretrained"]
        if not experiment.from_snapshots(settings) or name not in _KNOWN:
            raise
    try:
        known = _KNOWN[name]
        return known.clone(config=replace(known.config, **settings["model"]["options"]))
    except TypeError as error:
        raise ValueError(f"model.options: {error}") from error


def offset_bytes(settings: Settings, leaves: dict[str, jax.ShapeDtypeStruct]) -> int:
    """What the offsets of all tasks take, by the closed form.

    Raises:
      ValueError: as `plan_leaves`.
    """
    spec, num_tasks = settings["offsets"], len(settings["tasks"])
    if budget := spec["budget"]:
        share = budget * tree.param_bytes(leaves) if budget < 1 else budget
        return int(num_tasks * share)
    plans = plan_leaves(leaves, "flax", spec["rank"], spec["rank_rule"], spec["orientation"])
    entries = sum(
        plan.rank * (num_tasks * plan.solved_shape[0] + plan.solved_shape[1])
        for plan in plans.values()
    )
    # Of a leaf of one axis a vector a task, and a scalar.
    vectors = sum(num_tasks * leaf.size + 1 for name, leaf in leaves.items() if name not in plans)
    exact = spec["exact"]
    return (entries * exact["bits"] + vectors * exact["vector_bits"]) // 8


def forward_flops(model: Any, length: int) -> int:
    """Operations of the blocks for one input; a text has `length` tokens."""
    tokens = _tokens(model, length)
    kernels = sum(
        leaf.size
        for name, leaf in _leaves(model).items()
        if name.startswith("blocks") and name.endswith("kernel")
    )
    config = model.config
    return 2 * tokens * kernels + 4 * config.num_layers * tokens**2 * config.width


def block_bytes(model: Any, length: int) -> int:
    """What a block keeps for one input: what its layers read and return, and the weights of attention."""
    tokens, config = _tokens(model, length), model.config
    entries = tokens * (8 * config.width + 2 * config.mlp_dim) + config.num_heads * tokens**2
    return 4 * entries


def num_test(settings: Settings, name: str) -> int | None:
    """How many test inputs of a task are used; None where the size of its test set is not known."""
    most = settings["data"]["max_test"]
    size = data.num_test(name)
    return most if size is None else min(size, most or size)


def matmul_rate(dtype: Any) -> float:
    """Operations a second of a matrix product on the first device, the best of three."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


@lru_cache(maxsize=4)
def _leaves(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return tree.flatten(models.expected_params(model))


def _tokens(model: Any, length: int) -> int:
    config = model.config
    if "image" not in model.example_batch():
        return min(length, config.max_length)
    return (config.image_size // config.patch_size) ** 2 + 1


def _experts_to_make(settings: Settings) -> int:
    if experiment.from_snapshots(settings):
        return 0
    return len(
        experiment.missing_experts(experiment.experts_directory(settings), settings["tasks"])
    )


def _bytes(count: float) -> str:
    exponent = min(3, int(np.log10(max(count, 1)) // 3))
    return f"{count / 1000**exponent:.3g} {('B', 'kB', 'MB', 'GB')[exponent]}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
