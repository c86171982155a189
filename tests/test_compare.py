"""The comparison of methods, as a program."""

import json

import numpy as np
import pytest
import tiny

from retex_jax import collection, command_line, compare, evaluate, recovery, tree
from retex_jax.methods import METHODS


@pytest.fixture
def settings():
    return command_line.as_dict(tiny.get_config())


def test_plan_names_every_method_and_rank(settings):
    entries = compare.plan(settings)
    assert {method for method, _, _ in entries} == set(METHODS)
    assert [options for method, _, options in entries if method == "retex"] == [
        {"rank": 2},
        {"rank": 8},
    ]
    assert len({(method, variant) for method, variant, _ in entries}) == len(entries)


def test_plan_takes_names(settings):
    settings["methods"] = "emr, ties"
    assert [method for method, _, _ in compare.plan(settings)] == ["ties", "emr"]
    settings["methods"] = "emr,tie"
    with pytest.raises(ValueError, match=r"got \['tie'\].*did you mean 'ties'"):
        compare.plan(settings)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    run = tiny.trained(tmp_path_factory)
    settings = {**run.settings, "calibration": {"num_inputs": 20, "batch_size": 8}}
    with tiny.world(run.cache):
        collected = collection.collect(settings, run.backbone, run.tasks)
    return run, collected, collection.calibrate(settings, run.backbone, run.tasks, collected)


def test_calibration_carries_inputs_of_its_split_and_no_label(calibrated):
    run, _, calibrations = calibrated
    for split, calibration in calibrations.items():
        for task, batches in zip(run.tasks, calibration.batches, strict=True):
            assert [set(batch) for batch in batches] == [{"image"}, {"image"}]  # 4 are left over
            found = np.concatenate([batch["image"] for batch in batches])
            np.testing.assert_array_equal(found, task.splits[split]["image"][:16])


def test_calibration_computes_what_the_evaluation_does(calibrated):
    run, collected, calibrations = calibrated
    params, batch = collected.experts.expert_params(1), calibrations["test"].batches[1][0]
    head = list(collected.heads.values())[1]
    want = recovery.logits(head, recovery.run(run.backbone.model, params, batch, 8))
    found = calibrations["test"].logits(params, 1, batch)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    inputs = calibrations["test"].linear_inputs(params, batch)
    assert set(inputs) < set(tree.flatten(params))
    assert calibrations["train"].logits is calibrations["test"].logits


def test_routed_methods_are_scored_by_each_inputs_own_head(calibrated, monkeypatch):
    """A method that sends every input to one expert has that expert's accuracies."""
    run, collected, calibrations = calibrated
    params = collected.experts.expert_params(2)

    def predict(state, model, batch):
        assert set(batch) == {"image"}
        return model.features(params, batch)

    fixed = METHODS["twin"].__class__(
        None, lambda state, task: params, "none", lambda state: 30, predict=predict
    )
    monkeypatch.setitem(METHODS, "fixed", fixed)
    suite = collection.make_suite(run.settings, run.backbone, run.tasks, collected)
    row = evaluate.routed_row(suite, "fixed", "", None, calibrations["test"], 10**6, 1.5)
    assert row["accuracy"] == evaluate.known(suite, lambda task: params)
    assert (row["task_known"], row["head_known"]) == (False, True)
    assert row["bytes_per_task"] == 10


def test_every_method_runs(tmp_path_factory, tmp_path):
    run = tiny.trained(tmp_path_factory)
    config = tiny.get_config()
    config.calibration = {"num_inputs": 16, "batch_size": 8}
    config.evaluate.routed_inputs = 8
    config.method_options = {
        "adamerging": {"steps": 2},
        "wemoe": {"steps": 2},
        "dts_t": {"amr": 0.2},
        "smear_frozen": {"router_options": {"epochs": 2}},
        "twin": {"router_options": {"epochs": 2}},
    }
    with tiny.world(run.cache):
        results = compare.compare(config, tmp_path)
    assert results["failed"] == {}
    assert {row["method"] for row in results["rows"]} == set(METHODS)
    for row in results["rows"]:
        assert row["task_known"] == (METHODS[row["method"]].predict is None)


def test_a_method_that_fails_is_reported_and_the_rest_go_on(
    tmp_path_factory, tmp_path, monkeypatch
):
    run = tiny.trained(tmp_path_factory)
    config = tiny.get_config()
    config.methods = "weight_average,emr,svd,retex"

    def fail(experts, **options):
        raise FloatingPointError("no number")

    monkeypatch.setitem(METHODS, "emr", METHODS["emr"].__class__(fail, None, "none", None))
    with tiny.world(run.cache):
        results = compare.compare(config, tmp_path)
    assert results["failed"] == {"emr": "FloatingPointError: no number"}
    assert [row["method"] for row in results["rows"]] == [
        "weight_average",
        "svd",
        "retex",
        "retex",
    ]
    known = {
        (row["method"], row["variant"]): row for row in run.results["rows"] if row["task_known"]
    }
    average = results["rows"][0]
    assert average["accuracy"] == known["weight_average", ""]["accuracy"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "Accuracy against bytes" in (tmp_path / "report.html").read_text()


def test_nothing_left_is_an_error(tmp_path_factory, tmp_path, monkeypatch):
    run = tiny.trained(tmp_path_factory)
    config = tiny.get_config()
    config.methods = "svd"
    monkeypatch.setitem(METHODS, "svd", METHODS["svd"].__class__(None, None, "none", None))
    with tiny.world(run.cache), pytest.raises(ValueError, match="all failed"):
        compare.compare(config, tmp_path)
    assert not (tmp_path / "results.json").exists()
