"""The comparison of identifiers, as a program, and identifiers that are chosen on validation inputs."""

import json

import jax
import numpy as np
import pytest
import tiny

from retex_jax import (
    artifact,
    command_line,
    evaluate,
    identification,
    offsets,
    preflight,
    recovery,
    release,
    serving,
    task_features,
    train,
)
from retex_jax.identifier import IDENTIFIERS, selection
from retex_jax.identifier.out_of_distribution import residual
from retex_jax.identify import __main__ as identify
from retex_jax.identify import report as told

NAMES = list(tiny.NAMES)
GRIDS = {  # small: what is searched is tried in test_identifier_selection.py
    "subspace": {"rank": (2, 3), "joint": (False, True)},
    "router": {"kind": ("linear",)},
    "shared_mahalanobis": {"shrinkage": (0.1,)},
    "mahalanobis": {"shrinkage": (0.1,)},
    "neighbors": {"k": (1, 5)},
}
KINDS = ["subspace", "shared_mahalanobis", "mahalanobis"]


@pytest.fixture(scope="module", autouse=True)
def grids():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "GRIDS", GRIDS)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.trained(tmp_path_factory)


@pytest.fixture(scope="module")
def identified(run, tmp_path_factory):
    """Results, and the workdir."""
    config = tiny.get_config()
    config.identify.kinds = ", ".join(KINDS)
    config.identify.calibration_sizes = (2, 40)
    config.identify.max_forward = 0.5
    config.identify.unseen = (("dots",), ("bars", "rings"))
    workdir = tmp_path_factory.mktemp("identify") / "workdir"
    with tiny.world(run.cache):
        return identify.identify(config, workdir), workdir


@pytest.fixture(scope="module")
def features(run):
    """Of the merged model, and of the recovered experts."""
    released = run.released

    def of(experts):
        def params(task):
            return recovered(run, task) if experts else released.state.merged

        return task_features.extract(
            run.backbone.model, params, run.tasks, [0, 1, 2], 10, 32, experts=experts
        )

    return {experts: of(experts) for experts in (False, True)}


def recovered(run, task):
    return offsets.recover(run.released.state, task)


# Features


def test_features_of_all_layers_are_those_of_each(run, features):
    model, merged = run.backbone.model, run.released.state.merged
    found = features[False]
    for part, split, count in zip(found, ("train", "val", "test"), (10, None, None), strict=True):
        assert list(part) == [0, 1, 2]
        for layer, tasks in part.items():
            for task, own in zip(run.tasks, tasks, strict=True):
                inputs = {"image": task.splits[split]["image"][:count]}
                want = recovery.run(model, merged, inputs, 32, layer=layer)
                np.testing.assert_allclose(own, want, rtol=1e-5, atol=1e-6)


def test_features_of_experts(run, features):
    model, found = run.backbone.model, features[True]
    for task, own in enumerate(run.tasks):
        calibration = recovery.run(model, recovered(run, task), first(own, "train", 10), 32)
        np.testing.assert_allclose(found.calibration[0][task], calibration, rtol=1e-5, atol=1e-6)
        for split, part in (("val", found.validation), ("test", found.test)):
            for expert in range(3):
                want = recovery.run(model, recovered(run, expert), own.splits[split], 32, layer=1)
                np.testing.assert_allclose(part[1][task][expert], want, rtol=1e-5, atol=1e-6)


def test_identifiers_that_need_experts_get_those_that_are_recovered(run):
    config = tiny.get_config()
    config.identify.kinds, config.identify.calibration_sizes = "mahalanobis", ()
    settings = command_line.as_dict(config)
    (found,) = identify.extract(settings, run.backbone, run.tasks, run.released.state).values()
    task = run.tasks[0]
    want = recovery.run(run.backbone.model, recovered(run, 1), task.splits["test"], 32, layer=1)
    np.testing.assert_allclose(found.test[1][0][1], want, rtol=1e-5, atol=1e-6)


def first(task, split, count):
    return {"image": task.splits[split]["image"][:count]}


def test_every_input_runs_once(run, monkeypatch):
    ran, real, steps = [], recovery.run_layers, []

    def count(model, params, examples, *args):
        ran.append(len(examples["image"]))
        return real(model, params, examples, *args)

    monkeypatch.setattr(recovery, "run_layers", count)
    merged = run.released.state.merged
    found = task_features.extract(
        run.backbone.model,
        lambda _: merged,
        run.tasks,
        [1, 2],
        10**6,
        32,
        test=False,
        progress=lambda *step: steps.append(step),
    )
    sizes = [len(task.splits[split]["label"]) for task in run.tasks for split in ("train", "val")]
    assert sorted(ran) == sorted(sizes)
    assert steps[-1] == (sum(sizes), sum(sizes))
    assert sum(sizes) == task_features.num_inputs(run.tasks, 10**6, test=False)
    assert found.test == {}


def test_pooled_output_that_repeats_the_last_block_is_left_out(run):
    """As of a text model whose pooled output is the mean token."""

    def run_layers(model, params, examples, batch_size, layers):
        return {layer: np.full((len(examples["label"]), 2), max(layer, 1.0)) for layer in layers}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "run_layers", run_layers)
        for layers, want in (([0, 1], [1]), ([0, 1, 2], [0, 1, 2]), ([0], [0])):
            found = task_features.extract(None, lambda _: None, run.tasks, layers, 4, 8)
            assert list(found.calibration) == list(found.test) == want


# Choice


def test_the_choice_sees_no_test_input(run, features):
    own = features[False]
    want = identification.choose("subspace", own, 2)
    assert identification.choose("subspace", own._replace(test={}), 2).trials == want.trials
    assert len(want.trials) == identification.num_candidates("subspace", own, 2) == 4 * 4
    best = identification.best("subspace", want, 2, 3)
    assert best.validation_accuracy == want.score
    assert {"layer": best.layer, **best.options} == want.options


def test_layers_that_cost_too_much_are_not_tried(features):
    own, all_experts = features[False], features[True]
    found = identification.choose(
        "subspace", own, 2, max_forward=0.5, fixed={"rank": 1, "joint": False}
    )
    assert [trial.options for trial in found.trials] == [{"layer": 1}]
    best = identification.best("subspace", found, 2, 3, fixed={"rank": 1, "joint": False})
    assert (best.layer, best.forward) == (1, 0.5)
    assert best.options == {"rank": 1, "joint": False}
    found = identification.choose("mahalanobis", all_experts, 2, max_forward=1.5)
    assert [trial.options["layer"] for trial in found.trials] == [1]
    assert identification.best("mahalanobis", found, 2, 3, max_forward=1.4) is None


def test_a_row_by_hand(features):
    own = features[False]
    candidate = identification.Candidate("shared_mahalanobis", (1, 2), {"shrinkage": 0.3}, 0.5, 1.0)
    row = identification.row(candidate, own, NAMES, num_calibration=6)
    pairs = zip(own.calibration[1], own.calibration[2], strict=True)
    method = IDENTIFIERS["shared_mahalanobis"]
    state = method.fit([np.stack([a[:6], b[:6]], axis=1) for a, b in pairs], shrinkage=0.3)
    confusion = np.zeros((3, 3), int)
    for task, (a, b) in enumerate(zip(own.test[1], own.test[2], strict=True)):
        for found in np.asarray(method.scores(state, np.stack([a, b], axis=1))).argmax(axis=1):
            confusion[task, found] += 1
    np.testing.assert_array_equal(row["confusion"], confusion)
    each = confusion.diagonal() / confusion.sum(axis=1)
    assert row["task_accuracy"] == dict(zip(NAMES, each.tolist(), strict=True))
    assert row["accuracy"] == pytest.approx(each.mean())
    assert row["bytes"] == sum(x.nbytes for x in jax.tree.leaves(state))
    assert (row["num_calibration"], row["forward"]) == (6, 1.0)


# The program


def test_results_have_a_row_of_each_kind_and_limit(identified):
    results, workdir = identified
    assert json.loads((workdir / "results.json").read_text()) == results
    assert {path.name for path in workdir.iterdir()} == {".lock", "report.html", "results.json"}
    found = [(row["identifier"], row["limit"]) for row in results["identifiers"]]
    assert found == [
        ("subspace", None),
        ("subspace", 0.5),
        ("shared_mahalanobis", None),
        ("shared_mahalanobis", 0.5),
        ("mahalanobis", None),  # runs every expert, so that none is within the limit
    ]
    for row in results["identifiers"]:
        assert row["needs"] == IDENTIFIERS[row["identifier"]].needs
        trials = [
            trial for trial in results["trials"][row["identifier"]] if trial["score"] is not None
        ]
        within = [
            trial
            for trial in trials
            if row["limit"] is None or trial["options"]["layer"] == 1  # half of the blocks
        ]
        assert row["validation_accuracy"] == max(trial["score"] for trial in within)
        assert row["forward"] <= (row["limit"] or 3)
        assert row["accuracy"] > 0.9  # the tasks differ in brightness


def test_the_recommended_one_is_the_best_within_the_limit(identified):
    results, _ = identified
    (best,) = (row for row in results["identifiers"] if row["recommended"])
    within = [row for row in results["identifiers"] if row["limit"] is not None]
    assert best in within
    assert best["validation_accuracy"] == max(row["validation_accuracy"] for row in within)


def test_calibration_sizes_keep_layers_and_options(identified):
    results, _ = identified
    for swept, row in zip(results["calibration_sizes"], results["identifiers"], strict=True):
        assert swept["identifier"] == row["identifier"]
        assert list(swept["accuracy"]) == ["2", "40"]
        assert swept["accuracy"]["40"] == row["accuracy"]  # num_calibration is 40


def test_calibration_sizes_lower_a_number_of_neighbours(run, features):
    settings = tiny.settings_with(("identify.calibration_sizes", [2, 10]))
    row = {
        "identifier": "neighbors",
        "layer": 1,
        "options": {"k": 20, "normalize": True},
        "validation_accuracy": 1.0,
        "forward": 0.5,
        "limit": None,
    }
    given = (settings, run.tasks, features)
    (swept,) = identify.calibration_sweep(*given, [row], jax.random.key(0))
    lowered = {**row, "options": {**row["options"], "k": 6}}
    (again,) = identify.calibration_sweep(*given, [lowered], jax.random.key(0))
    assert swept["accuracy"]["2"] == again["accuracy"]["2"]
    assert list(swept["accuracy"]) == ["2", "10"]


def test_tasks_are_held_out_as_set(identified):
    results, _ = identified
    found = results["out_of_distribution"]
    assert [(row["identifier"], row["unseen"], row["measure"]) for row in found] == [
        (kind, unseen, measure)
        for kind in ("subspace", "shared_mahalanobis")
        for unseen in (["dots"], ["bars", "rings"])
        for measure in ("entropy", "residual")
    ]
    for row in found:
        assert all(0 <= row[name] <= 1 for name in ("precision", "recall", "f1", "auroc", "aupr"))
    assert found[1]["auroc"] > 0.9


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"task_weights": "energy"}, False),
        ({"task_weights": "divergence"}, True),
        ({"budget": 0.3, "leaf_weights": "fisher"}, True),
    ],
)
def test_offsets_are_given_the_inputs_that_they_need(options, needed, run, tmp_path, monkeypatch):
    config = tiny.get_config()
    config.offsets.update(options)
    given = []

    def stop(*_, calibration, **options):
        given.append(calibration)
        raise KeyboardInterrupt

    monkeypatch.setattr(preflight, "check", lambda *_, **__: None)  # it tries what fits
    monkeypatch.setattr(offsets, "fit", stop)
    with tiny.world(run.cache), pytest.raises(KeyboardInterrupt):
        identify.identify(config, tmp_path)
    assert [inputs is not None for inputs in given] == [needed]
    assert not needed or len(given[0].batches) == len(NAMES)


def test_routed_experts_beside_the_oracle(run, identified):
    results, _ = identified
    (best,) = (row for row in results["identifiers"] if row["recommended"])
    oracle, head, nothing = results["rows"]
    assert (oracle["task_known"], head["head_known"], nothing["head_known"]) == (True, True, False)
    (want,) = (
        row
        for row in run.results["rows"]
        if row["variant"] == "exact r=8" and row["task_known"] and row["method"] == "retex"
    )
    assert oracle["accuracy"] == want["accuracy"]
    counts = np.array(best["confusion"])
    assert head["identification_accuracy"] == pytest.approx(counts.trace() / counts.sum())
    lost = results["gap"]
    assert sum(lost.values()) == pytest.approx(1 - nothing["normalized_accuracy"])
    assert lost["recovery"] == pytest.approx(1 - oracle["normalized_accuracy"])


def test_a_gap_by_hand():
    rows = [{"normalized_accuracy": value} for value in (0.9, 0.8, 0.5)]
    found = told.gap(*rows)
    want = {"recovery": 0.1, "routed_backbone": 0.1, "routed_head": 0.3}
    assert found == pytest.approx(want)
    assert told.gap(rows[0], rows[1], {"normalized_accuracy": None}) is None


def test_the_page_and_the_terminal_show_all_tables(identified, capsys):
    results, workdir = identified
    page = (workdir / "report.html").read_text()
    assert (
        page.count("<svg") >= 5 + 4
    )  # a confusion matrix each, a histogram of each split and measure
    told.print_results(results)
    said = capsys.readouterr().out
    for title in (
        "Identifiers",
        "Identification of each task",
        "Calibration inputs a task",
        "Inputs of no known task",
        "Where accuracy is lost",
    ):
        assert title in page
        assert title in said
    assert "shared_mahalanobis" in said


def test_problems_are_listed_at_once(run):
    settings = tiny.settings_with(
        ("identify.kinds", "subspce"),
        ("identify.max_forward", 0.1),
        ("identify.calibration_sizes", [1]),
        ("identify.target", 1.5),
        ("identify.unseen", [["dots"], ["tots"], NAMES]),
        ("identifier.layer", 9),
    )
    with tiny.world(run.cache):
        preflight.check(tiny.settings_with(), identifies=True)
        with pytest.raises(ValueError) as error:
            preflight.check(settings, identifies=True)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert [line.split(":")[0] for line in lines] == [
        "identifier.layer",
        "identify.max_forward",
        "identify.kinds",
        "identify.calibration_sizes",
        "identify.target",
        "identify.unseen",
        "identify.unseen",
    ]
    assert "did you mean 'subspace'" in lines[2]
    only_experts = tiny.settings_with(("identify.kinds", "mahalanobis"))
    with tiny.world(run.cache), pytest.raises(ValueError, match="expected one without experts"):
        preflight.check(only_experts, identifies=True)


# Chosen in a run


@pytest.fixture(scope="module")
def searched(run, tmp_path_factory):
    """Results and workdir of a run that chooses its identifier."""
    config = tiny.get_config()
    config.baselines = {}
    config.offsets.extra_ranks = ()
    config.identifier.search = True
    config.identifier.options = {"rank": 2}
    workdir = tmp_path_factory.mktemp("searched") / "workdir"
    with tiny.world(run.cache):
        return train.train(config, workdir), workdir


def test_a_run_records_what_it_chose(run, searched):
    results, workdir = searched
    choice = results["identifier"]
    assert choice["searched"]
    assert (choice["kind"], choice["options"]["rank"]) == ("subspace", 2)
    assert 0.9 < choice["validation_accuracy"] <= 1
    assert artifact.load(workdir).metadata["identifier_choice"] == choice
    assert run.results["identifier"] == {
        "searched": False,
        "kind": "subspace",
        "layer": 1,
        "options": {"rank": 3, "center": True, "normalize": False},
        "validation_accuracy": None,
        "forward": 0.5,
    }


def test_a_chosen_identifier_is_served(run, searched):
    results, workdir = searched
    released = release.load(workdir)
    layer = results["identifier"]["layer"]
    assert released.identifier.layer == (tuple(layer) if isinstance(layer, list) else layer)
    with tiny.world(run.cache):
        served = serving.Recovered.load(workdir, max_batch=32)
        images = run.tasks[1].splits["test"]["image"][:20]
        found = served.identify({"image": images})
        rows, confusion = evaluate.unknown_rows(
            tiny.suite(run), "v", released.state, released.identifier, 0.0
        )
    assert found.count("bars") > 18
    assert rows[0]["identification_accuracy"] == confusion.trace() / confusion.sum()
    want = next(row for row in results["rows"] if row["identification_accuracy"] is not None)
    assert rows[0]["identification_accuracy"] == want["identification_accuracy"]


@pytest.mark.parametrize(
    "kind",
    [
        "shared_mahalanobis",
        "mahalanobis",
        pytest.param("neighbors", marks=pytest.mark.slow),
        pytest.param("router", marks=pytest.mark.slow),
    ],
)
def test_any_identifier_can_be_chosen(run, kind):
    changes = [("identifier.kind", kind), ("identifier.search", True)]
    if kind == "router":
        changes.append(("identifier.options", {"epochs": 2}))
    settings = tiny.settings_with(*changes)
    found, choice = identification.obtain(
        settings, run.backbone.model, run.released.state, run.tasks, jax.random.key(0)
    )
    cost = 3 if kind == "mahalanobis" else 1
    assert choice["forward"] <= cost
    inputs = {"image": run.tasks[2].splits["val"]["image"]}
    scores = recovery.task_scores(
        run.backbone.model,
        run.released.state.merged,
        found,
        inputs,
        32,
        lambda task: recovered(run, task),
    )
    assert np.isfinite(np.asarray(residual(scores))).all()
    assert np.mean(scores.argmax(axis=1) == 2) > 0.7


def test_settings_of_a_search(run):
    bad = tiny.settings_with(
        ("identifier.search", True),
        ("identifier.max_forward", 0.0),
        ("identifier.options", {"rank": 40}),
    )
    with tiny.world(run.cache):
        with pytest.raises(ValueError) as error:
            preflight.check(bad)
        preflight.check(tiny.settings_with(("identifier.search", True), ("identifier.rank", 99)))
        joint = tiny.settings_with(("identifier.options", {"joint": True}))
        with pytest.raises(ValueError, match=r"options\.joint: got True, but identifier\.layers"):
            preflight.check(joint)
    lines = [line.strip().split(":")[0] for line in str(error.value).splitlines()[1:]]
    assert lines == ["identifier.max_forward", "identifier.rank"]
    assert command_line.as_dict(tiny.get_config())["identifier"]["search"] is False
