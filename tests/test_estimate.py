"""What a run is estimated to take, beside what XLA counts and what a fit stores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import finetune_roberta, gpt2_glue7, vit_b32_8
from retex_jax import command_line, data, estimate, models, offsets, tree
from retex_jax.experts import ExpertSet

SIZES = {"width": 128, "num_layers": 2, "num_heads": 2, "mlp_dim": 256}
VIT = models.ViT(models.ViTConfig(image_size=32, patch_size=4, **SIZES))
GPT2 = models.Gpt2(dataclasses.replace(models.GPT2, vocab_size=64, max_length=64, **SIZES))


@pytest.fixture(autouse=True)
def world(tmp_path):
    with tiny.world(tmp_path / "cache"):
        yield


@pytest.mark.parametrize("model", [VIT, GPT2], ids=["vit", "gpt2"])
def test_operations_are_those_that_xla_counts(model):
    batch = {"image": jnp.zeros((1, 32, 32, 3), jnp.uint8)}
    if model is GPT2:
        batch = dict.fromkeys(("input_ids", "attention_mask"), jnp.ones((1, 64), jnp.int32))

    def forward(params, batch):
        return model.apply({"params": params}, batch).pooled

    lowered = jax.jit(forward).lower(models.expected_params(model), batch)
    counted = lowered.cost_analysis()["flops"]
    found = estimate.forward_flops(model, 64)
    assert 0.85 * counted < found < counted


@pytest.mark.parametrize("rank_rule", ["paper", "clip"])
def test_offsets_take_what_a_fit_stores(rank_rule):
    settings = tiny.settings_with(("offsets.rank_rule", rank_rule), ("offsets.rank", 4))
    model = estimate.build_model(settings)
    leaves = tree.flatten(models.expected_params(model))
    rng = np.random.default_rng(0)
    trees = [
        tree.unflatten({name: rng.normal(size=x.shape).astype("f4") for name, x in leaves.items()})
        for _ in range(4)
    ]
    state = offsets.fit(ExpertSet.from_trees(trees[0], trees[1:]), rank=4, rank_rule=rank_rule)
    stored = offsets.offset_bytes(state) - tree.param_bytes(state.task_embeddings)
    assert estimate.offset_bytes(settings, leaves) == stored


def test_budgets_are_kept():
    leaves = {"kernel": jax.ShapeDtypeStruct((10, 10), jnp.float32)}
    for budget, want in ((0.05, 3 * 20), (1000, 3000)):
        assert estimate.offset_bytes(tiny.settings_with(("offsets.budget", budget)), leaves) == want


def test_models_of_known_repositories_need_no_snapshot(tmp_path):
    config = vit_b32_8.get_config()
    config.experts.root = str(tmp_path)
    found = estimate.estimate(command_line.as_dict(config))
    assert found.num_params == 87_456_000  # of the vision tower without its projection
    assert found.expert_bytes == 9 * found.model_bytes == 9 * 4 * found.num_params
    assert found.artifact_bytes > found.model_bytes
    assert found.device_bytes > 3 * found.model_bytes
    assert found.unsized == ()
    # A pass takes 8.7 operations of 10^9 an image; 7 passes of 87,433 images, and 200 a task.
    assert found.flops == pytest.approx((7 * 87_433 + 1600) * 8.7e9, rel=0.02)
    config.experts.pretrained = "owner/other"
    [line] = estimate.lines(command_line.as_dict(config))
    assert "can be estimated when the model is known" in line


def test_texts_and_options(tmp_path):
    config = gpt2_glue7.get_config()
    config.experts.root = str(tmp_path)
    full = estimate.estimate(command_line.as_dict(config))
    config.model.max_length = 128
    assert full.flops > 4 * estimate.estimate(command_line.as_dict(config)).flops
    config.model.options = {"param_dtype": "bfloat16"}
    half = estimate.estimate(command_line.as_dict(config))
    assert (half.num_params, 2 * half.model_bytes) == (full.num_params, full.model_bytes)
    config.model.options = {"no_field": 1}
    with pytest.raises(ValueError, match=r"model\.options"):
        estimate.build_model(command_line.as_dict(config))


def test_experts_that_are_to_be_made_count():
    settings = tiny.settings_with(("data.max_test", None))
    found = estimate.estimate(settings)
    assert found.unsized == tiny.NAMES
    spec = settings["finetune"]
    trained = 3 * len(tiny.NAMES) * spec["steps"] * spec["batch_size"]
    a_pass = estimate.forward_flops(estimate.build_model(settings), 0)
    assert found.flops == a_pass * (trained + len(tiny.NAMES) * 40)


def test_training_of_one_expert(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "matmul_rate", lambda dtype: 1e12)
    config = finetune_roberta.get_config()
    config.experts.root = str(tmp_path)
    settings = command_line.as_dict(config)
    assert estimate.num_steps(settings) == 4_810  # ten passes of 7,696 of CoLA's 8,551, 16 at once
    model, disk, memory, took = estimate.training_lines(settings)
    assert model == "model: 124,055,040 parameters, 496 MB"
    assert disk == "disk: 992 MB of pretrained model and expert, 1.98 GB of checkpoints"
    assert f"on each of {jax.device_count()} devices (cpu)" in memory
    # Three passes of 128 tokens through 85.0 million weights of blocks, two operations each, and attention.
    flops = 3 * 4_810 * 16 * (2 * 128 * 84.9e6 + 4 * 12 * 128**2 * 768)
    assert f"for 4,810 steps, {flops:.1e} operations of the model, texts at full length" in took
    config.finetune.steps = -1
    [line] = estimate.training_lines(command_line.as_dict(config))
    assert "can be estimated when" in line
    config.finetune.steps = 7
    assert estimate.num_steps(command_line.as_dict(config)) == 7
    config.finetune.update(steps=0, epochs=1.0)
    config.task = "dtd"
    assert estimate.num_steps(command_line.as_dict(config)) is None
    assert estimate.training_lines(command_line.as_dict(config))[-1] == (
        "time: not known, as the training examples of dtd are not"
    )
    config.experts.pretrained = "owner/other"
    [line] = estimate.training_lines(command_line.as_dict(config))
    assert "can be estimated when the model is known" in line


def test_sizes_of_test_sets():
    assert estimate.num_test(tiny.settings_with(("data.max_test", 500)), "rte") == 277
    assert estimate.num_test(tiny.settings_with(("data.max_test", 100)), "rte") == 100
    assert estimate.num_test(tiny.settings_with(("data.max_test", None)), "rte") == 277
    assert estimate.num_test(tiny.settings_with(("data.max_test", 100)), "dots") == 100
    sizes = [data.num_test(name) for name in ("weather", "mmlu", "fruits-360", "dots")]
    assert sizes == [1_372, 14_042, None, None]


def test_lines(monkeypatch):
    monkeypatch.setattr(estimate, "matmul_rate", lambda dtype: 1e6)
    model, disk, memory, took = estimate.lines(tiny.settings_with())
    assert model.startswith("model: 4,") and model.endswith(" kB")
    assert "of pretrained model and experts" in disk
    assert "on one device (cpu)" in memory
    assert " minutes for " in took and "at 1.0e+06 a second as measured here" in took
    assert "full length" not in took


@pytest.mark.parametrize(
    "path", ["finetune.steps", "evaluate.batch_size", "identifier.num_calibration"]
)
def test_wrong_settings_are_not_estimated(path):
    [line] = estimate.lines(tiny.settings_with((path, -1)))
    assert "can be estimated when" in line


def test_matrix_products_are_timed():
    assert 1e8 < estimate.matmul_rate(jnp.float32) < 1e16


def test_units():
    assert [estimate._bytes(n) for n in (0, 999, 1_234, 57e6, 4.2e13)] == [
        *("0 B", "999 B", "1.23 kB", "57 MB", "4.2e+04 GB"),
    ]
    assert [estimate._duration(s) for s in (1, 150, 9000, 400_000)] == [
        *("1.0 seconds", "2.5 minutes", "2.5 hours", "4.6 days"),
    ]
