"""Experiments whose model and experts are Hugging Face snapshots, made here of random weights."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny_snapshots import WORDS, clip_snapshots, roberta_snapshots, shifted

from retex_jax import (
    command_line,
    experiment,
    export,
    huggingface,
    lora,
    models,
    offsets,
    preflight,
    recovery,
    release,
    train,
    tree,
)
from retex_jax.convert.architectures import ARCHITECTURES, load


def clip_config(root):
    """The tiny experiment on the snapshots of `clip_snapshots`."""
    config = tiny.get_config()
    config.model.name = "huggingface"
    config.model.options = {}
    config.experts.root = str(root)
    config.experts.pretrained = "owner/base"
    config.experts.repositories = tuple(f"owner/{name}" for name in tiny.NAMES)
    config.experts.templates = ("a photo of {}.", "{}")
    config.offsets.rank = 4
    config.offsets.extra_ranks = ()
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The program, from snapshots to an artefact."""
    root = tmp_path_factory.mktemp("snapshots")
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    clip, params = clip_snapshots(root)
    config = clip_config(root)
    with tiny.world(tmp_path_factory.mktemp("cache")):
        results = train.train(config, workdir)
        backbone, tasks = experiment.load(command_line.as_dict(config))
    return root, workdir, clip, params, config, results, backbone, tasks


def test_run_reports_the_experts_own_accuracy(run):
    root, _, clip, params, _, results, _, tasks = run
    located = huggingface.Located(root / "owner/base", {n: root / "owner" / n for n in tiny.NAMES})
    heads = huggingface.zero_shot_heads(located.pretrained, tasks, ("a photo of {}.", "{}"))
    for task in tasks:
        vision = dict(load(root / "owner" / task.name).params)
        vision["projection"] = params["vision"]["projection"]
        model = models.ViT(dataclasses.replace(clip.vision_config, normalize=True))
        test = task.splits["test"]
        features = model.apply({"params": vision}, {"image": test["image"]}).pooled
        want = np.asarray(features @ heads[task.name]["kernel"])
        accuracy = float((want.argmax(axis=1) == test["label"]).mean())
        assert results["individual"][task.name] == pytest.approx(accuracy, abs=1e-6)
        backbone = {name: leaf for name, leaf in vision.items() if name != "projection"}
        own = recovery.run(run[6].model, backbone, test, 32)
        np.testing.assert_allclose(
            recovery.logits(heads[task.name], own), want, rtol=1e-4, atol=1e-4
        )


def test_run_names_its_experts(run):
    *_, results, _, _ = run
    assert results["checkpoint_set"].startswith("base-")
    assert results["offsets"]["ratio"] == pytest.approx(1, abs=1e-6)
    assert results["linear_probe"] == {}


def test_experts_are_read_as_they_lie(run):
    root, *_, backbone, _ = run
    located = huggingface.Located(root / "owner/base", {n: root / "owner" / n for n in tiny.NAMES})
    experts, heads = huggingface.open_experts(located, backbone)
    assert heads == dict.fromkeys(tiny.NAMES)
    want = tree.flatten(load(root / "owner/bars").params)
    found = tree.flatten(experts.expert_params(tiny.NAMES.index("bars")))
    assert set(found) == set(want)
    for name in want:
        np.testing.assert_array_equal(found[name], want[name])


def test_missing_snapshots_are_all_named(tmp_path):
    config = clip_config(tmp_path)
    with tiny.world(tmp_path / "cache"):
        text = "\n".join(preflight.missing(command_line.as_dict(config)))
    for repository in (config.experts.pretrained, *config.experts.repositories):
        assert f"download {repository} --local-dir {tmp_path}/{repository}" in text


def test_one_repository_a_task(tmp_path):
    config = clip_config(tmp_path)
    config.experts.repositories = config.experts.repositories[:2]
    with tiny.world(tmp_path / "cache"):
        text = "\n".join(preflight.missing(command_line.as_dict(config)))
    assert "experts.repositories: got 2, expected one for each of the 3 tasks" in text


def test_damaged_snapshot_stops_before_any_work(tmp_path):
    clip_snapshots(tmp_path)
    (tmp_path / "owner/bars/model.safetensors").write_bytes(b"none")
    with tiny.world(tmp_path / "cache"), pytest.raises(ValueError, match=r"bars.*safetensors"):
        train.train(clip_config(tmp_path), tmp_path / "workdir")
    assert not (tmp_path / "workdir/results.json").exists()


def test_dry_run_compares_all_tensors(tmp_path):
    clip_snapshots(tmp_path)
    config = clip_config(tmp_path)
    with tiny.world(tmp_path / "cache"):
        assert preflight.missing(command_line.as_dict(config)) == []
        key = "vision_model.encoder.layers.0.mlp.fc1.bias"
        for name in ("bars", "rings"):
            path = tmp_path / f"owner/{name}/model.safetensors"
            tensors = load_file(path)
            if name == "bars":
                tensors[key] = np.zeros(7, np.float32)
                tensors["vision_model.more"] = np.zeros(1, np.float32)
            else:
                del tensors[key]
            save_file(tensors, path)
        config.experts.pretrained = "owner/dots"
        text = "\n".join(preflight.missing(command_line.as_dict(config)))
    bars, rings = (f"experts: {tmp_path}/owner/{name}: " for name in ("bars", "rings"))
    assert f"{bars}misshaped: {key}" in text and f"{bars}extra: vision_model.more" in text
    assert f"{rings}missing: {key}" in text
    assert f"experts: {tmp_path}/owner/dots: expected a CLIPModel" in text


def test_tower_without_a_clip_has_no_head(tmp_path):
    clip_snapshots(tmp_path)
    config = clip_config(tmp_path)
    config.experts.pretrained = "owner/dots"
    with tiny.world(tmp_path / "cache"), pytest.raises(ValueError, match="expected a CLIPModel"):
        train.train(config, tmp_path / "workdir")


# Classifiers and adapters on a text task


def text_batch():
    rng = np.random.default_rng(0)
    mask = (np.arange(7) < rng.integers(1, 8, (9, 1))).astype(np.int32)
    return {
        "input_ids": rng.integers(3, len(WORDS), (9, 7)).astype("i4") * mask,
        "attention_mask": mask,
    }


def test_classifiers_bring_their_heads(tmp_path):
    _, made = roberta_snapshots(tmp_path)
    located = huggingface.Located(tmp_path / "base", {name: tmp_path / name for name in made})
    backbone = huggingface.load_backbone(located, {}, max_length=8)
    assert backbone.architecture == "RobertaForSequenceClassification"
    assert backbone.encode(["red green"])["input_ids"].shape == (1, 8)
    experts, heads = huggingface.open_experts(located, backbone)
    batch = text_batch()
    for index, (name, (model, params)) in enumerate(made.items()):
        want = model.apply({"params": params}, batch)
        features = recovery.run(backbone.model, experts.expert_params(index), batch, 4)
        np.testing.assert_allclose(
            recovery.logits(heads[name], features), want, rtol=1e-4, atol=1e-5
        )


def test_adapters_are_experts(tmp_path):
    """The offset of a recovered expert, written as an adapter, is read as that expert."""
    base, made = roberta_snapshots(tmp_path)
    located = huggingface.Located(tmp_path / "base", {name: tmp_path / name for name in made})
    backbone = huggingface.load_backbone(located, {})
    experts, _ = huggingface.open_experts(located, backbone)
    state = offsets.fit(experts, key=jax.random.key(0), rank=3)
    state = dataclasses.replace(state, merged=base)
    table = ARCHITECTURES["RobertaModel"].table(backbone.model)
    names = export.torch_names(tree.flatten(base), table)
    adapter = lora.adapter_from_offset(state, 1, torch_names=names)
    lora.save_adapter(tmp_path / "adapter", adapter.tensors, adapter.config)
    found, heads = huggingface.open_experts(
        huggingface.Located(tmp_path / "base", {"only": tmp_path / "adapter"}), backbone
    )
    assert heads == {"only": None}
    want, got = tree.flatten(offsets.recover(state, 1)), tree.flatten(found.expert_params(0))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)


# Export


def test_export_of_a_vision_tower(run, tmp_path):
    _, workdir, *_ = run
    released = release.load(workdir)
    written = export.export_model(released, "dots", tmp_path / "out")
    assert set(written) >= {
        "config.json",
        "model.safetensors",
        "head.safetensors",
        "tokenizer.json",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(written)
    again = load(tmp_path / "out")
    assert again.architecture.name == "CLIPVisionModel"
    want = tree.flatten(offsets.recover(released.state, tiny.NAMES.index("dots")))
    for name, leaf in tree.flatten(again.params).items():
        np.testing.assert_array_equal(leaf, want[name])


def test_export_of_the_merged_model(run, tmp_path):
    _, workdir, *_ = run
    released = release.load(workdir)
    export.export_model(released, "merged", tmp_path)
    want = tree.flatten(released.state.merged)
    for name, leaf in tree.flatten(load(tmp_path).params).items():
        np.testing.assert_array_equal(leaf, want[name])
    assert not (tmp_path / "head.safetensors").exists()


def test_export_refuses_what_is_not_there(run, tmp_path):
    released = release.load(run[1])
    with pytest.raises(ValueError, match=r"task: got 'dot'.*did you mean 'dots'"):
        export.export_model(released, "dot", tmp_path / "out")
    with pytest.raises(ValueError, match="expected a task's name"):
        export.export_adapter(released, "merged", tmp_path / "out", base=None, partial=True)
    with pytest.raises(ValueError, match="an adapter can't hold"):
        export.export_adapter(released, "dots", tmp_path / "out", base=None, partial=False)
    random = dataclasses.replace(released, metadata={**released.metadata, "architecture": ""})
    with pytest.raises(ValueError, match="none of transformers'"):
        export.export_model(random, "dots", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_of_an_added_task_asks_for_its_classes(run, tmp_path):
    released = release.load(run[1])
    names = [*tiny.NAMES[:-1], "new"]
    released = dataclasses.replace(
        released,
        heads=dict(zip(names, released.heads.values(), strict=True)),
        metadata={
            **released.metadata,
            "architecture": "Dinov2Model",
            "settings": {"model": {"options": {"pool": "cls"}}},
        },
    )
    with pytest.raises(ValueError, match=r"task: the class names of 'new' are not known"):
        export.export_model(released, "new", tmp_path / "out")


def test_exported_adapter_names_what_it_leaves_out(run, tmp_path):
    released = release.load(run[1])
    left_out = export.export_adapter(released, "dots", tmp_path, base="merged", partial=True)
    assert left_out == ("cls_token",)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "merged"


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.torch
def test_dinov2_expert_loads_in_transformers_with_its_head(run, tmp_path, pool):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = models.ViTConfig(
        image_size=8,
        patch_size=4,
        width=16,
        num_layers=2,
        num_heads=2,
        mlp_dim=64,
        layer_scale=True,
        pool=pool,
    )
    model = models.ViT(config)
    base = models.init_params(model, jax.random.key(0))
    released = release.load(run[1])
    from retex_jax import ExpertSet

    experts = ExpertSet.from_trees(base, [shifted(base, i) for i in range(3)], names=tiny.NAMES)
    rng = np.random.default_rng(0)
    heads = {
        name: {
            "kernel": rng.normal(size=(16, 3)).astype("f4"),
            "bias": rng.normal(size=3).astype("f4"),
        }
        for name in tiny.NAMES
    }
    released = dataclasses.replace(
        released,
        state=offsets.fit(experts, key=jax.random.key(0), rank=4),
        heads=heads,
        metadata={
            **released.metadata,
            "architecture": "Dinov2Model",
            "hf_config": ARCHITECTURES["Dinov2Model"].to_hf(model),
            "settings": {"model": {"name": "dinov2_small", "options": {"pool": pool}}},
        },
    )
    export.export_model(released, "bars", tmp_path)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "Dinov2ForImageClassification"
    assert theirs.config.id2label[1] == "class 1"
    image = rng.normal(size=(3, 8, 8, 3)).astype("f4")
    features = model.apply({"params": offsets.recover(released.state, 1)}, {"image": image}).pooled
    with torch.no_grad():
        want = theirs(torch.tensor(image.transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(recovery.logits(heads["bars"], features), want, atol=1e-4, rtol=1e-4)


def test_roberta_expert_is_exported_with_its_own_classes(tmp_path):
    _, made = roberta_snapshots(tmp_path)
    located = huggingface.Located(tmp_path / "base", {name: tmp_path / name for name in made})
    backbone = huggingface.load_backbone(located, {})
    experts, heads = huggingface.open_experts(located, backbone)
    state = offsets.fit(experts, key=jax.random.key(0), rank=4)
    metadata = {
        "architecture": backbone.architecture,
        "hf_config": experiment.hf_config(backbone),
        "classes": {"first": ["x", "y", "z"], "second": ["p", "q"]},
        "settings": {
            "model": {"name": "huggingface"},
            "tasks": list(made),
            "experts": {
                "root": "",
                "pretrained": str(tmp_path / "base"),
                "repositories": [str(tmp_path / name) for name in made],
                "revisions": {},
            },
        },
    }
    released = release.Release(state, None, heads, metadata)
    written = export.export_model(released, "second", tmp_path / "out")
    assert sorted(written) == ["config.json", "model.safetensors", "tokenizer.json"]
    again = load(tmp_path / "out")
    assert again.hf_config["id2label"] == {"0": "p", "1": "q"}
    batch = text_batch()
    features = recovery.run(backbone.model, offsets.recover(state, 1), batch, 4)
    np.testing.assert_allclose(
        again.model.apply({"params": again.params}, batch),
        recovery.logits(heads["second"], features),
        rtol=1e-4,
        atol=1e-5,
    )


def test_text_data_goes_through_the_snapshots_tokenizer(tmp_path):
    roberta_snapshots(tmp_path)
    located = huggingface.Located(tmp_path / "base", {"first": tmp_path / "first"})
    encode = huggingface.load_backbone(located, {}, max_length=6).encode
    assert encode(["red blue"])["input_ids"].tolist() == [
        [WORDS.index("red"), WORDS.index("blue"), WORDS.index("[EOS]"), 0, 0, 0]
    ]
    (tmp_path / "base/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        huggingface.load_backbone(located, {})
