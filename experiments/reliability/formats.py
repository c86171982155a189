"""What is fuzzed: how each kind of file is written, and read by the library.

Each has a name, a share of the cases, `write` of a sample, and `read`, which gives nested dicts, lists and arrays.
Some have `answers`, which are right beside the sample's; `truth`, which reads without the library what the files say
where they have no hash; `make_fit`, which writes the hashes anew, as a hostile author would; and `use` of what loads.
"""

import contextlib
import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import jax
import mutations
import numpy as np
import safetensors.numpy

from retex_jax import (
    artifact,
    compare,
    data,
    experiment,
    finetune,
    offsets,
    preflight,
    release,
    tree,
)
from retex_jax.checkpoint import Checkpointer
from retex_jax.experts import ExpertSet
from retex_jax.identifier import IDENTIFIERS
from retex_jax.lora.source import LoraSource
from retex_jax.offsets import factor_file, factor_header
from retex_jax.recovery import Identifier
from retex_jax.snapshot import SafetensorsFile, Snapshot
from retex_jax.sources import TreeSource
from retex_jax.unseen import __main__ as unseen

NAMES = ("one", "two")
SETTINGS = {
    **{name: {} for name in ("tasks", "data", "finetune", "calibration", "evaluate")},
    "seed": 0,
    "model": {"name": "vit"},
    "experts": {"pretrained": ""},
    "search": {"num_inputs": 1},
    "identifier": {},
    "offsets": {},
    "unseen": {"num_train": 1, "num_test": 1, "temperatures": []},
}
EXPERIMENT = {"name": "tiny", "offsets": {"rank": 2, "base": "ties"}, "tasks": [*NAMES]}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Leaves of a small model; two have one shape."""
    rng = np.random.default_rng(seed)
    return {
        "a.weight": rng.normal(size=(6, 8)).astype("f4"),
        "b.weight": rng.normal(size=(6, 8)).astype("f4"),
        "b.bias": rng.normal(size=6).astype("f4"),
    }


def expert_set() -> ExpertSet:
    """Two experts of it."""
    trees = [
        tree.unflatten({name.replace(".", "/"): x for name, x in arrays(seed).items()})
        for seed in range(3)
    ]
    return ExpertSet.from_trees(trees[0], trees[1:], names=NAMES, layout="torch")


def flat_state(state: offsets.OffsetState) -> dict[str, Any]:
    """All that a state says."""
    report = state.report
    return {
        "merged": tree.flatten(state.merged),
        "embeddings": state.task_embeddings,
        "offsets": {name: jax.tree.leaves(form) for name, form in state.offsets.items()},
        "forms": str(jax.tree.structure(state.offsets)),
        "report": [report.residuals, report.optima, report.energies],
        "layout": state.layout,
    }


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of what it holds beside."""
    body = {name: part for name, part in value.items() if name != "sha256"}
    text = json.dumps(body, sort_keys=True).encode()
    return {**body, "sha256": hashlib.sha256(text).hexdigest()}


def digest(content: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(content).hexdigest()


class Artifact:
    """artifact.safetensors and manifest.json of a release."""

    name, share = "artefact", 22

    def write(self, folder: Path) -> None:
        """Writes a sample."""
        state = offsets.fit(expert_set(), rank=2, bits=3)
        features = [np.random.default_rng(task).normal(size=(9, 4)).astype("f4") for task in (0, 1)]
        known = IDENTIFIERS["subspace"].fit(features, rank=2)
        head = {"kernel": np.ones((6, 2), "f4"), "bias": np.zeros(2, "f4")}
        identifier = Identifier(known, 0, "subspace")
        facts = {"settings": {"rank": 2}}
        release.save(folder, release.Release(state, identifier, dict.fromkeys(NAMES, head), facts))

    def read(self, folder: Path) -> Any:
        """Reads the release."""
        found = release.load(folder)
        return {
            "state": flat_state(found.state),
            "identifier": jax.tree.leaves(found.identifier.state),
            "heads": {name: dict(head) for name, head in found.heads.items()},
            "metadata": found.metadata,
        }

    def use(self, folder: Path) -> None:
        """Recovers an expert."""
        offsets.recover(release.load(folder).state, 0)

    def make_fit(self, folder: Path, done: str, rng: random.Random) -> None:
        """Writes the hashes that a hostile author would."""
        path = folder / artifact.TENSORS
        manifest = json.loads((folder / artifact.MANIFEST).read_text())
        if not done.endswith(artifact.MANIFEST):
            content = path.read_bytes()
            manifest["file"] |= {"bytes": len(content), "sha256": digest(content)}
            with contextlib.suppress(ValueError):  # what cannot be read stays as it is
                opened = SafetensorsFile(path)
                manifest["tensors"] = {
                    name: {
                        "shape": list(spec.shape),
                        "dtype": spec.dtype.name,
                        "sha256": digest(opened.read(name).tobytes()),
                    }
                    for name, spec in opened.specs.items()
                }
        (folder / artifact.MANIFEST).write_text(json.dumps(sealed(manifest)))


class Factors:
    """The file of a fit."""

    name, share = "factor file", 14
    _file = "factors.safetensors"

    def write(self, folder: Path) -> None:
        """Writes a sample."""
        offsets.fit(expert_set(), rank=2, bits=3, file=folder / self._file)

    def read(self, folder: Path) -> Any:
        """Opens it."""
        return flat_state(factor_file.load(folder / self._file))

    def use(self, folder: Path) -> None:
        """Recovers an expert."""
        offsets.recover(factor_file.load(folder / self._file), 0)

    def make_fit(self, folder: Path, done: str, rng: random.Random) -> None:
        """Writes the hashes that a hostile author would."""
        path = folder / self._file
        opened = SafetensorsFile(path)
        metadata = dict(opened.metadata)
        hashes = [digest(opened.read(name).tobytes()) for name in opened.specs]
        metadata["sha256"] = json.dumps(hashes)
        metadata.pop(factor_header.SEAL, None)
        if rng.random() < 0.5:
            fact = rng.choice(list(metadata))
            metadata[fact] = mutations.json_text(metadata[fact].encode(), rng).decode()
        described = {name: factor_header.describe(spec) for name, spec in opened.specs.items()}
        metadata[factor_header.SEAL] = factor_header.seal(metadata, described)
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]) | {"__metadata__": metadata}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


class Unfinished:
    """An exact fit that was killed, and goes on."""

    name, share = "unfinished fit", 4
    _file = "factors.safetensors"

    def write(self, folder: Path) -> None:
        """Writes a sample, with one leaf finished."""

        def stop(done: int, _: int) -> None:
            if done:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            self._fit(folder, progress=stop)

    def read(self, folder: Path) -> Any:
        """Goes on."""
        self._fit(folder)
        return flat_state(factor_file.load(folder / self._file))

    def _fit(self, folder: Path, **options: Any) -> None:
        options |= {"rank": 2, "bits": 3, "group_bytes": 1}
        offsets.fit(expert_set(), file=folder / self._file, resume="fuzz", **options)


class Checkpoint:
    """Two steps of a checkpoint; the older one is a right answer where the newer one is named as broken."""

    name, share = "checkpoint", 12

    def _tree(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng(step)
        return {
            "params": {
                "kernel": rng.normal(size=(5, 4)).astype("f4"),
                "other": rng.normal(size=(5, 4)).astype("f4"),
            },
            "count": np.int32(step),
        }

    def write(self, folder: Path) -> None:
        """Writes a sample."""
        for step in (1, 2):
            Checkpointer(folder / "steps").save(step, self._tree(step), {"step": step})

    def read(self, folder: Path) -> Any:
        """Restores the newest whole step."""
        kept = Checkpointer(folder / "steps")
        latest = kept.latest()
        if latest is None:
            raise FileNotFoundError(f"{kept.directory}: no whole step")
        return [latest, kept.metadata(latest), kept.restore(latest, self._tree(0))]

    def answers(self) -> list[Any]:
        """Both steps."""
        return [[step, {"step": step}, self._tree(step)] for step in (1, 2)]

    def make_fit(self, folder: Path, done: str, rng: random.Random) -> None:
        """Writes the hashes of files that a hostile author would."""
        for step in sorted((folder / "steps").iterdir()):
            path = step / "record.json"
            record = json.loads(path.read_text())
            if not done.endswith(path.name):
                record["files"] = {
                    name: [len(content), digest(content)]
                    for name in record["files"]
                    for content in [(step / name).read_bytes()]
                }
            path.write_text(json.dumps(sealed(record)))


class Experts:
    """Fine-tuned experts and their records."""

    name, share = "own experts", 8

    def write(self, folder: Path) -> None:
        """Writes a sample."""
        artifact.write_json(folder / "experts.json", {"checkpoint_set": "fuzz"})
        for number, name in enumerate(NAMES):
            path = folder / f"{name}.safetensors"
            artifact.save_safetensors(path, arrays(number))
            record = {"task": name, "accuracy": {"test": 0.5}, "linear_probe": {"test": 0.25}}
            record["file_sha256"] = digest(path.read_bytes())
            artifact.write_json(folder / f"{name}.json", sealed(record))

    def read(self, folder: Path) -> Any:
        """Reads all; one that is missing would be made again."""
        if missing := experiment.missing_experts(folder, NAMES):
            raise FileNotFoundError(f"{folder}: {missing}")
        tasks = [data.Task(name, (), {}, "", "") for name in NAMES]
        backbone: Any = None
        records = finetune.build_experts(backbone, tasks, folder, {}, checkpoint_set="fuzz")
        return [records, {name: dict(Snapshot(folder / f"{name}.safetensors")) for name in NAMES}]

    def truth(self, folder: Path) -> Any:
        """What records and files say; records of before they had hashes are believed."""
        records = {name: json.loads((folder / f"{name}.json").read_text()) for name in NAMES}
        if all("sha256" in record for record in records.values()):
            raise ValueError("these have hashes")
        return [
            records,
            {name: safetensors.numpy.load_file(folder / f"{name}.safetensors") for name in NAMES},
        ]


class Rows:
    """Rows of a comparison that a later run keeps; a row that is not kept is fitted again."""

    name, share = "compared rows", 8

    def write(self, folder: Path) -> None:
        """Writes a sample."""
        rows = [
            {"entry": name, "seeds": [0], "accuracy": {"one": 0.5, "two": index}}
            for index, name in enumerate(("ties", "retex"))
        ]
        searches = {"ties": {"density": 0.2}}
        text = json.dumps([rows, searches], sort_keys=True).encode()
        results = {"identity": compare.identity(SETTINGS), "rows": rows, "searches": searches}
        artifact.write_json(folder / "results.json", {**results, "sha256": digest(text)})

    def read(self, folder: Path) -> Any:
        """What is kept."""
        return list(compare.previous(folder / "results.json", [], SETTINGS))

    def answers(self) -> list[Any]:
        """None kept; a row is whole or fitted again."""
        return [[{}, {}]]

    def truth(self, folder: Path) -> Any:
        """What the file says; results of before they were hashed are believed."""
        results = json.loads((folder / "results.json").read_text())
        if "sha256" in results:
            raise ValueError("these have a hash")
        rows = {row["entry"]: row for row in results["rows"]}
        return [rows, {name: x for name, x in results["searches"].items() if name in rows}]


class UnseenRows:
    """Rows of unseen tasks that a later run keeps; see `Rows`."""

    name, share = "unseen rows", 4

    def write(self, folder: Path) -> None:
        """Writes a sample."""
        rows = [{"ties": {"unseen": {name: 0.5}, "seen": {}}} for name in NAMES]
        splits = [{"name": name, "rows": row} for name, row in zip(NAMES, rows, strict=True)]
        others = {"three": {"ties": {"unseen": {"three": 0.25}, "seen": {}}}}
        text = json.dumps(dict(zip(NAMES, rows, strict=True)) | others, sort_keys=True).encode()
        results = {"identity": unseen.identity(SETTINGS), "splits": splits, "others": others}
        artifact.write_json(folder / "results.json", {**results, "sha256": digest(text)})

    def read(self, folder: Path) -> Any:
        """What is kept."""
        return unseen.previous(folder / "results.json", SETTINGS)

    def answers(self) -> list[Any]:
        """None kept."""
        return [{}]

    def truth(self, folder: Path) -> Any:
        """What the file says; results of before they were hashed are believed."""
        results = json.loads((folder / "results.json").read_text())
        if "sha256" in results:
            raise ValueError("these have a hash")
        return {split["name"]: split["rows"] for split in results["splits"]} | results["others"]


class Workdir:
    """The settings that a workdir is of."""

    name, share = "workdir", 4

    def write(self, folder: Path) -> None:
        """Writes a sample."""
        artifact.write_json(folder / "config.json", EXPERIMENT)

    def read(self, folder: Path) -> Any:
        """Whether it is this experiment's; one without settings is anybody's."""
        preflight.check_workdir(EXPERIMENT, folder)
        return "ours"


class Plain:
    """Checkpoints of others, without any hash: one file each."""

    name, share = "safetensors", 14

    def write(self, folder: Path) -> None:
        """Writes a sample."""
        for number, name in enumerate(("base.safetensors", *(f"{x}.safetensors" for x in NAMES))):
            safetensors.numpy.save_file(arrays(number), folder / name, {"format": "pt"})

    def read(self, folder: Path) -> Any:
        """Reads all leaves of all experts."""
        paths = [folder / f"{name}.safetensors" for name in NAMES]
        experts = ExpertSet.from_safetensors(folder / "base.safetensors", paths, layout="torch")
        return {name: [experts.pretrained(name), experts.stacked(name)] for name in experts.leaves}

    def truth(self, folder: Path) -> Any:
        """What the files say."""
        base, *experts = (
            {
                name.replace(".", "/"): x
                for name, x in safetensors.numpy.load_file(folder / f"{file}.safetensors").items()
            }
            for file in ("base", *NAMES)
        )
        return {name: [base[name], np.stack([own[name] for own in experts])] for name in base}


class Shards:
    """A Hugging Face snapshot in shards."""

    name, share = "snapshot", 10

    def write(self, folder: Path) -> None:
        """Writes a sample."""
        tensors = arrays()
        parts = {"part-1.safetensors": ["a.weight"], "part-2.safetensors": ["b.weight", "b.bias"]}
        for file, names in parts.items():
            safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file)
        index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))

    def read(self, folder: Path) -> Any:
        """Reads all."""
        opened = Snapshot(folder)
        return [dict(opened), opened.config]

    def truth(self, folder: Path) -> Any:
        """What the files say."""
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        path = folder / "config.json"
        tensors = {
            name: safetensors.numpy.load_file(folder / file)[name]
            for name, file in index["weight_map"].items()
        }
        return [tensors, json.loads(path.read_text()) if path.exists() else None]


class Adapter:
    """A PEFT LoRA adapter."""

    name, share = "LoRA adapter", 8

    def write(self, folder: Path) -> None:
        """Writes a sample."""
        rng = np.random.default_rng(0)
        tensors = {
            f"base_model.model.{module}.lora_{side}.weight": rng.normal(size=shape).astype("f4")
            for module in ("a", "b")
            for side, shape in (("A", (2, 8)), ("B", (6, 2)))
        }
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a", "b"]}
        config |= {"bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False}
        safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))

    def read(self, folder: Path) -> Any:
        """Reads all leaves."""
        base = {name.replace(".", "/"): x for name, x in arrays().items()}
        opened = LoraSource(folder, TreeSource(tree.unflatten(base)))
        return {name: opened.read(name) for name in opened.leaves}

    def truth(self, folder: Path) -> Any:
        """What the files say, with PEFT's defaults."""
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
        scaling = np.float32(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        found = {name.replace(".", "/"): x for name, x in arrays().items()}
        for module in ("a", "b"):
            key = f"base_model.model.{module}.lora_"
            if f"{key}A.weight" in tensors:
                a, b = (tensors[f"{key}{side}.weight"].astype("f4") for side in "AB")
                found[f"{module}/weight"] = (b * scaling) @ a + found[f"{module}/weight"]
        return found


FORMATS: list[Any] = [
    Artifact(),
    Factors(),
    Unfinished(),
    Checkpoint(),
    Experts(),
    Rows(),
    UnseenRows(),
    Workdir(),
    Plain(),
    Shards(),
    Adapter(),
]


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal to the last bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray | np.generic | jax.Array):
        mine, theirs = np.asarray(one), np.asarray(other)
        alike = mine.dtype == theirs.dtype and mine.shape == theirs.shape
        return alike and mine.tobytes() == theirs.tobytes()
    return type(one) is type(other) and (one == other or (one != one and other != other))
