"""The comparison of methods, as a program."""

import json

import pytest
import tiny

from retex_jax import command_line, compare
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
