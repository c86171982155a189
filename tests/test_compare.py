"""The comparison of methods, as a program."""

import dataclasses
import json

import jax
import ml_collections
import numpy as np
import pytest
import tiny

from retex_jax import (
    collection,
    command_line,
    compare,
    data,
    evaluate,
    logging,
    protocols,
    recovery,
    search,
    tree,
    variants,
)
from retex_jax.bench import Bench, choose, fit_row, searched, validation_score
from retex_jax.methods import METHODS, NEEDS

SEARCH = {"enabled": True, "num_inputs": 8}


@pytest.fixture
def settings():
    return command_line.as_dict(tiny.get_config())


def test_plan_names_every_method_and_rank(settings):
    entries = variants.plan(settings)
    assert {entry.method for entry in entries} == set(METHODS)
    assert [entry.options for entry in entries if entry.method == "retex"] == [
        {"rank": 2},
        {"rank": 8},
    ]
    assert len({entry.name for entry in entries}) == len(entries)


def test_plan_takes_names(settings):
    settings["methods"] = "emr, svd"
    names = [entry.name for entry in variants.plan(settings)]
    assert names == ["svd", "emr", "emr from=weight_average"]
    settings["methods"] = "emr,tie"
    with pytest.raises(ValueError, match=r"got \['tie'\].*did you mean 'ties'"):
        variants.plan(settings)


def test_further_variants_come_last(settings):
    small = {"budget": 0.01, "bits": 3}
    settings["extra_variants"] = [["retex", small], ["emr", {}], ["dts_t", {"amr": 0.5}]]
    settings["methods"] = "retex,dts_t"
    entries = variants.plan(settings)
    assert [entry.name for entry in entries[-2:]] == ["retex budget=0.01, bits=3", "dts_t amr=0.5"]
    assert [entry.name for entry in entries].count("emr") == 0
    settings["extra_variants"] = [["rtx", small]]
    with pytest.raises(ValueError, match=r"extra_variants: got \['rtx'\]"):
        variants.plan(settings)


def test_a_further_variant_may_name_what_is_searched(settings):
    grid = {"shrinkage": [1.0, 0.1]}
    settings["extra_variants"] = [["retex", {"rank": 3}], ["retex", {"rank": 3}, grid]]
    settings["methods"] = "retex"
    plain, searched = variants.plan(settings)[-2:]
    assert (plain.name, searched.name) == ("retex rank=3", "retex rank=3, shrinkage (validation)")
    assert (plain.grid, searched.grid) == ({}, grid)
    settings["method_options"] = {"retex": {"shrinkage": 0.5}}
    (found,) = (entry for entry in variants.plan(settings) if entry.options["rank"] == 3)
    assert (found.name, found.grid) == ("retex rank=3, shrinkage=0.5", {})
    settings |= {"method_options": {}, "search": {"enabled": False, "num_inputs": 8}}
    assert variants.plan(settings)[-1] == plain


def test_methods_that_mix_by_input_are_not_planned_for_questions(settings):
    settings["tasks"] = list(data.QUESTIONS)[:2]
    methods = {entry.method for entry in variants.plan(settings)}
    routed = {name for name, method in METHODS.items() if method.predict is not None}
    assert methods == set(METHODS) - routed and routed
    settings["methods"] = "ties,dawin"
    with pytest.raises(ValueError, match=r"methods: \['dawin'\] give features of inputs"):
        variants.plan(settings)


def test_ties_is_scaled_as_its_merge(settings):
    settings |= {"methods": "ties", "search": {"enabled": False, "num_inputs": 8}}

    def scalings(**given):
        settings["method_options"] = {"ties": given}
        return [entry.options.get("scaling") for entry in variants.plan(settings)]

    assert scalings() == [1.0, 1.0]
    assert scalings(merge="sum") == [0.3, 0.3]
    assert scalings(merge="mean") == [1.0, 1.0]
    assert scalings(merge="sum", scaling=0.7) == [0.7, 0.7]
    settings["extra_variants"] = [["ties", {"scaling": 2.0}]]
    assert scalings(merge="sum") == [0.3, 0.3, 2.0]


def test_plan_lists_every_problem(settings):
    settings |= {"num_seeds": 0, "search": {"enabled": True, "num_inputs": 0}}
    settings["method_options"] = {"tie": {}}
    with pytest.raises(ValueError) as error:
        variants.plan(settings)
    for part in ("num_seeds: got 0", "search.num_inputs: got 0", "method_options: got ['tie']"):
        assert part in str(error.value)


def test_every_published_grid_is_searched_once_a_variant(settings):
    entries = [entry for entry in variants.plan(settings) if entry.grid]
    assert [entry.name for entry in entries] == [
        "task_arithmetic scaling (validation)",
        "ties density=0.2, merge=mean, scaling (validation)",
        "dare merge=weight_average, drop (validation)",
        "dare merge=task_arithmetic, drop (validation)",
        "dare merge=ties, drop (validation)",
        "consensus mask_lambda, scaling (validation)",
        "tall_mask mask_lambda (validation)",
    ]
    grids = search.default_grids()
    assert all(entry.grid == grids[entry.method] for entry in entries)
    assert all(not set(entry.grid) & set(entry.options) for entry in entries)
    assert entries[5].num_candidates == 50
    assert {entry.needs for entry in entries} == {"labelled validation inputs"}
    wanted = "mask_lambda=0.2/0.4, scaling=0.3 (validation)"
    assert entries[5].variant({"mask_lambda": (0.2, 0.4), "scaling": 0.3}) == wanted


def test_what_the_user_sets_is_not_searched(settings):
    settings["methods"] = "consensus,ties"
    settings["method_options"] = {"consensus": {"scaling": 0.5}, "ties": {"merge": "sum"}}
    entries = {entry.name: entry for entry in variants.plan(settings)}
    tenths = [float(f"{i / 10:.1f}") for i in range(1, 11)]
    found = entries["ties density=0.2, merge=sum, scaling (validation)"]
    assert list(found.grid["scaling"]) == tenths
    found = entries["consensus scaling=0.5, mask_lambda (validation)"]
    assert list(found.grid) == ["mask_lambda"]
    settings["search"]["enabled"] = False
    assert not any(entry.grid for entry in variants.plan(settings))


def test_entries_that_options_make_equal_are_one(settings):
    settings["method_options"] = {"dts_t": {"amr": 0.2}}
    names = [entry.name for entry in variants.plan(settings)]
    assert [name for name in names if name.startswith("dts_t")] == ["dts_t amr=0.2"]


def test_seeds_are_of_what_is_random(settings):
    settings["num_seeds"] = 4
    for method, options, want in (
        ("dare", {}, 4),
        ("twin", {}, 4),
        ("fisher", {"num_samples": 2}, 4),
        ("fisher", {}, 1),
        ("retex", {"solver": "adam"}, 4),
        ("retex", {"base": "dare"}, 4),
        ("retex", {"rank": 2}, 1),
        ("dts_d", {}, 1),
        ("dawin", {}, 1),
    ):
        entry = variants.Entry(method, options)
        assert variants.seeds(entry, settings) == list(range(want)), (method, options)


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
    found = calibrations["test"].logits(params, head, batch)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    inputs = calibrations["test"].linear_inputs(params, batch)
    assert set(inputs) < set(tree.flatten(params))
    assert calibrations["train"].logits is calibrations["test"].logits


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("fisher", {"num_samples": 1}, marks=pytest.mark.slow),
        pytest.param("fisher", {}, marks=pytest.mark.slow),
        pytest.param("regmean", {}, marks=pytest.mark.slow),
        pytest.param("adamerging", {"steps": 1}, marks=pytest.mark.slow),
        ("svd", {"base": "dare"}),
        ("dts_d", {"base": "dare"}),
        ("retex", {"rank": 2, "base": "dare"}),
        ("retex", {"rank": 2, "solver": "adam", "steps": 1, "warmup_steps": 0}),
        ("twin", {"router_options": {"epochs": 1}}),
        ("dawin", {}),
        ("smear_frozen", {"router_options": {"epochs": 1}}),
        pytest.param("wemoe", {"steps": 1}, marks=pytest.mark.slow),
    ],
)
def test_only_what_is_called_random_depends_on_the_key(calibrated, name, options):
    """The other methods, and DARE, are tried in test_methods.py."""
    _, collected, calibrations = calibrated
    given = dict(options)
    if split := NEEDS[METHODS[name].needs]:
        given["calibration"] = calibrations[split]
    states = [
        METHODS[name].fit(collected.experts, key=jax.random.key(seed), **given) for seed in (0, 1)
    ]
    equal = all(
        np.array_equal(one, two) for one, two in zip(*map(jax.tree.leaves, states), strict=True)
    )
    assert equal == (not METHODS[name].random(options))


@pytest.fixture(scope="module")
def bench(calibrated):
    run, collected, _ = calibrated
    settings = {**run.settings, "search": SEARCH, "num_seeds": 3}
    return Bench(settings, run.backbone, run.tasks, collected, logging.Clock())


def test_options_are_chosen_on_validation_inputs_only(bench, calibrated):
    run, collected, _ = calibrated
    suite = bench.validation
    for task, whole in zip(suite.tasks, run.tasks, strict=True):
        assert set(task.splits) == {"val"}
        for name, array in task.splits["val"].items():
            np.testing.assert_array_equal(array, whole.splits["val"][name][:8])
    params = collected.experts.expert_params(1)
    scores = validation_score(suite, "weight_average")(params)
    for index, task in enumerate(run.tasks):
        val = task.splits["val"]
        right = []
        for one in (params, collected.experts.expert_params(index)):
            features = recovery.run(run.backbone.model, one, data.take(val, np.arange(8)), 8)
            head = list(collected.heads.values())[index]
            right.append((recovery.logits(head, features).argmax(1) == val["label"][:8]).mean())
        assert scores[index] == right[0] / right[1]


def test_experts_that_have_none_right_are_not_divided_by(bench, calibrated):
    params = calibrated[1].experts.expert_params(1)
    individual = dict.fromkeys(bench.validation.individual, 0.5) | {"dots": 0.0}
    suite = bench.validation._replace(individual=individual)
    scores = validation_score(suite, "weight_average")(params)
    assert scores == list(protocols.known(suite, lambda task: params, "val").values())


def test_a_search_ends_in_the_row_of_its_best_options(bench):
    (entry,) = (e for e in variants.plan({**bench.settings, "methods": "tall_mask"}) if e.grid)
    calls = []
    found = choose(bench, entry, lambda done, **shown: calls.append((done, shown)))
    assert len(found.trials) == 5
    assert calls[-1] == (5, {"candidate": "5/5"})
    assert (2, {"candidate": "3/5", "task": "1/3"}) in calls
    chosen = search.chosen_options("tall_mask", found)
    assert chosen == {"mask_lambda": found.per_task("mask_lambda")}
    row = fit_row(bench, entry, chosen, lambda *done, **shown: None)
    state = METHODS["tall_mask"].fit(bench.experts(None), **chosen)
    want = protocols.known(bench.suite, lambda task: METHODS["tall_mask"].recover(state, task))
    assert row["accuracy"] == want
    words = "/".join(map(str, chosen["mask_lambda"]))
    assert row["variant"] == f"mask_lambda={words} (validation)"
    assert row["needs"] == "labelled validation inputs"
    assert (row["seeds"], row["normalized_accuracy_std"]) == ([0], None)


def test_what_is_searched_may_need_data(bench):
    grid = {"shrinkage": (1.0, 0.1)}
    entry = variants.Entry("retex", {"rank": 2, "bits": 3}, grid=grid)
    found = choose(bench, entry, lambda done, **shown: None)
    assert [trial.error for trial in found.trials] == [None, None]
    row = fit_row(bench, entry, {"shrinkage": 0.1}, lambda *done, **shown: None)
    state = METHODS["retex"].fit(
        bench.experts(None), rank=2, bits=3, calibration=bench.calibrations["train"], shrinkage=0.1
    )
    want = protocols.known(bench.suite, lambda task: METHODS["retex"].recover(state, task))
    assert row["accuracy"] == want
    assert row["needs"] == "calibration inputs; labelled validation inputs"
    plain = variants.Entry("retex", {"rank": 2})
    assert bench.data_options(plain) == {}


def test_candidates_after_the_first_compile_nothing(bench, caplog):
    entry = variants.Entry("consensus", {}, None, {"mask_lambda": (0.2,), "scaling": (0.1,)})
    choose(bench, entry, lambda *done, **shown: None)
    rest = {"mask_lambda": (0.3, 0.6), "scaling": (0.4, 0.9)}
    with jax.log_compiles():
        choose(bench, dataclasses.replace(entry, grid=rest), lambda *done, **shown: None)
        assert not [text for text in caplog.messages if text.startswith("Compiling")]
        jax.jit(lambda x: x * 3.25)(np.ones(7))
        assert [text for text in caplog.messages if text.startswith("Compiling")]


def test_rows_of_several_seeds(bench):
    entry = variants.Entry("dare", {"drop": 0.9})
    row = fit_row(bench, entry, {}, lambda *done, **shown: None)
    scores, accuracies = [], []
    for seed in range(3):
        key = jax.random.fold_in(jax.random.key(bench.settings["seed"]), seed)
        merged = METHODS["dare"].fit(bench.experts(None), key=key, drop=0.9)
        accuracy = protocols.known(bench.suite, lambda task, merged=merged: merged)
        accuracies.append(accuracy)
        own = bench.suite.individual
        scores.append(sum(accuracy[task] / own[task] for task in own) / len(own))
    assert len(set(scores)) > 1
    assert row["seeds"] == [0, 1, 2]
    np.testing.assert_allclose(row["normalized_accuracies"], scores, rtol=1e-12)
    np.testing.assert_allclose(row["normalized_accuracy"], sum(scores) / 3, rtol=1e-12)
    spread = (sum((x - sum(scores) / 3) ** 2 for x in scores) / 2) ** 0.5
    np.testing.assert_allclose(row["normalized_accuracy_std"], spread, rtol=1e-9)
    half_width = 4.302652729749464 * spread / 3**0.5  # Student's t of 2 degrees of freedom, 97.5%
    np.testing.assert_allclose(row["normalized_accuracy_interval"], half_width, rtol=1e-9)
    worst = [min(accuracy[task] / own[task] for task in own) for accuracy in accuracies]
    np.testing.assert_allclose(row["worst_normalized_accuracy"], sum(worst) / 3, rtol=1e-12)
    for task, value in row["accuracy"].items():
        np.testing.assert_allclose(value, sum(a[task] for a in accuracies) / 3, rtol=1e-12)


def test_difference_vectors_are_of_the_averaged_model(bench):
    """EMR by hand on d_t = theta_t - theta_merge, of a leaf."""
    experts = bench.experts(None)
    moved = bench.experts("weight_average")
    assert bench.experts("weight_average") is moved
    name = experts.float_leaves[-1]
    merged = np.asarray(experts.stacked(name), np.float64).mean(axis=0)
    np.testing.assert_allclose(moved.pretrained(name), merged, rtol=1e-5, atol=1e-6)
    row = fit_row(
        bench, variants.Entry("t_switch", {}, "weight_average"), {}, lambda *done, **shown: None
    )
    state = METHODS["t_switch"].fit(moved)
    want = protocols.known(bench.suite, lambda task: METHODS["t_switch"].recover(state, task))
    assert row["accuracy"] == want
    assert row["variant"] == "from=weight_average"


@pytest.mark.parametrize("num_inputs", [5, 10**6])
def test_routed_methods_are_scored_by_each_inputs_own_head(calibrated, monkeypatch, num_inputs):
    """A method that sends every input to one expert has that expert's accuracies, and is measured by the experts'
    own on the same inputs."""
    run, collected, calibrations = calibrated
    params = collected.experts.expert_params(2)
    sizes = []

    def predict(state, model, batch):
        assert set(batch) == {"image"}
        sizes.append(len(batch["image"]))
        return model.features(params, batch)

    fixed = METHODS["twin"].__class__(
        None, lambda state, task: params, "none", lambda state: 30, predict=predict
    )
    monkeypatch.setitem(METHODS, "fixed", fixed)
    whole = collection.make_suite(run.settings, run.backbone, run.tasks, collected)
    suite = protocols.first_tests(whole, num_inputs, collected.experts.expert_params)
    tests = [task.splits["test"]["label"][:num_inputs] for task in run.tasks]
    for task, labels in zip(suite.tasks, tests, strict=True):
        np.testing.assert_array_equal(task.splits["test"]["label"], labels)
    assert suite.individual == protocols.known(suite, collected.experts.expert_params)
    count = sum(map(len, tests))
    suite = suite._replace(batch_size=count // 2 + 1)
    row = evaluate.routed_row(suite, "fixed", "", None, calibrations["test"], 1.5)
    assert sizes == [count // 2 + 1, count - count // 2 - 1]  # no row fills the last batch up
    assert row["accuracy"] == protocols.known(suite, lambda task: params)
    assert row["individual"] == suite.individual
    third = run.tasks[2].name
    assert row["accuracy"][third] == suite.individual[third]
    ratios = [row["accuracy"][task] / own for task, own in suite.individual.items()]
    np.testing.assert_allclose(row["normalized_accuracy"], np.mean(ratios), rtol=1e-12)
    assert (row["task_known"], row["head_known"]) == (False, True)
    assert row["bytes_per_task"] == 10


def test_every_method_runs(tmp_path_factory, tmp_path, capsys):
    run = tiny.trained(tmp_path_factory)
    config = tiny.get_config()
    config.calibration = {"num_inputs": 16, "batch_size": 8}
    config.evaluate.routed_inputs = 8
    config.search.num_inputs = 4
    config.num_seeds = 2
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
    entries = variants.plan(command_line.as_dict(config))
    assert [row["entry"] for row in results["rows"]] == [entry.name for entry in entries]
    assert list(results["searches"]) == [entry.name for entry in entries if entry.grid]
    for row, entry in zip(results["rows"], entries, strict=True):
        assert row["task_known"] == (METHODS[row["method"]].predict is None)
        assert row["needs"] == entry.needs
        assert len(row["seeds"]) == len(row["normalized_accuracies"])
        assert (row["normalized_accuracy_std"] is None) == (row["seeds"] == [0])
        if entry.grid:
            found = results["searches"][entry.name]
            assert len(found["trials"]) == entry.num_candidates
            assert found["score"] == max(trial["score"] for trial in found["trials"])
            assert row["variant"].endswith(" (validation)")
            kept = searched(entry, found["chosen"], _found(found))
            assert json.loads(json.dumps(kept)) == found
    text = capsys.readouterr().out
    assert "+-" in text and "scaling=" in text
    page = (tmp_path / "report.html").read_text()
    assert "mean \u00b1 standard deviation of 2 seeds" in page
    with tiny.world(run.cache):
        again = compare.compare(config, tmp_path)
    assert again["rows"] == results["rows"] and again["searches"] == results["searches"]
    assert f"kept {len(entries)} rows" in capsys.readouterr().err


def _found(told):
    trials = [
        search.Trial(t["options"], t["score"], tuple(t["task_scores"]), t["error"])
        for t in told["trials"]
    ]
    return search.SearchResult({}, told["score"], tuple(trials))


def test_a_run_that_was_stopped_goes_on(tmp_path_factory, tmp_path, monkeypatch, capsys):
    run = tiny.trained(tmp_path_factory)
    config = tiny.get_config()
    config.methods = "weight_average,dare,svd"
    config.search.enabled = False
    config.num_seeds = 2
    fits = []

    def counted(name, stops=False):
        fit = METHODS[name].fit

        def count(experts, **options):
            if stops:
                raise KeyboardInterrupt
            fits.append(name)
            return fit(experts, **options)

        return dataclasses.replace(METHODS[name], fit=count)

    path = tmp_path / "results.json"
    with tiny.world(run.cache):
        for name in ("weight_average", "dare"):
            monkeypatch.setitem(METHODS, name, counted(name))
        with monkeypatch.context() as patch:
            patch.setitem(METHODS, "svd", counted("svd", stops=True))
            with pytest.raises(KeyboardInterrupt):
                compare.compare(config, tmp_path)
        assert fits == ["weight_average", *["dare"] * 6]
        before = json.loads(path.read_text())
        assert [row["method"] for row in before["rows"]] == ["weight_average", *["dare"] * 3]
        fits.clear()
        capsys.readouterr()
        after = compare.compare(config, tmp_path)
        assert fits == []
        assert "kept 4 rows" in capsys.readouterr().err
        assert after["rows"][:4] == before["rows"] and after["rows"][4]["method"] == "svd"
        with monkeypatch.context() as patch:
            # Nothing is left to fit: neither data nor experts are read.
            patch.setattr(compare, "_load", None)
            assert compare.compare(config, tmp_path) == after
        config.methods, config.num_seeds = "dare,weight_average", 3  # svd stays in the table
        assert compare.compare(config, tmp_path)["rows"][4] == after["rows"][4]
        assert fits == ["dare"] * 9
        fits.clear()
        old = json.loads(path.read_text())
        for row in old["rows"]:
            if row["method"] == "weight_average":
                del row["worst_normalized_accuracy"]  # of before there was such a measure
        del old[compare._HASH]
        path.write_text(json.dumps(old))
        again = compare.compare(config, tmp_path)
        assert fits == ["weight_average"]
        assert all("worst_normalized_accuracy" in row for row in again["rows"])
        fits.clear()
        config.calibration.num_inputs += 1
        config.methods = "weight_average"
        assert [row["method"] for row in compare.compare(config, tmp_path)["rows"]] == [
            "weight_average"
        ]
        assert fits == ["weight_average"]
        assert "is replaced" in capsys.readouterr().err


def test_rows_of_other_experts_are_not_mixed_with_those_of_these(tmp_path_factory, tmp_path):
    run, config = tiny.trained(tmp_path_factory), tiny.get_config()
    config.methods, path = "weight_average", tmp_path / "results.json"
    with tiny.world(run.cache):
        results = compare.compare(config, tmp_path)
        task = next(iter(results["individual"]))
        results["individual"][task] /= 2  # as of another machine
        path.write_text(json.dumps(results))
        assert compare.compare(config, tmp_path)["rows"] == results["rows"]  # nothing to fit
        config.methods = "weight_average,task_arithmetic"
        with pytest.raises(ValueError, match=f"rows relative to experts of accuracies {{'{task}':"):
            compare.compare(config, tmp_path)
    assert json.loads(path.read_text()) == results


def test_a_method_that_fails_is_reported_and_the_rest_go_on(
    tmp_path_factory, tmp_path, monkeypatch
):
    run = tiny.trained(tmp_path_factory)
    config = tiny.get_config()
    config.methods = "weight_average,emr,svd,retex"

    def fail(experts, **options):
        raise KeyError("no leaf")

    monkeypatch.setitem(METHODS, "emr", METHODS["emr"].__class__(fail, None, "none", None))
    with tiny.world(run.cache):
        results = compare.compare(config, tmp_path)
    assert results["failed"] == {
        "emr": "KeyError: 'no leaf'",
        "emr from=weight_average": "KeyError: 'no leaf'",
    }
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


def test_experts_of_several_seeds(tmp_path_factory, tmp_path, capsys):
    """Each seed is a comparison of its own, and the table is of their means."""
    run = tiny.trained(tmp_path_factory)
    config = tiny.get_config()
    config.methods, config.search.enabled, config.num_seeds = "weight_average,dare", False, 2
    with tiny.world(run.cache):
        config.expert_seeds = (config.seed, 7)
        results = compare.compare(config, tmp_path)
        alone = command_line.as_dict(config)
        alone.update(seed=7, expert_seeds=())
        one = compare.compare(ml_collections.ConfigDict(alone), tmp_path / "seed_7")
    assert f"kept {len(one['rows'])} rows" in capsys.readouterr().err
    other = json.loads((tmp_path / f"seed_{config.seed}" / "results.json").read_text())
    assert other["individual"] != one["individual"]
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert (results["expert_seeds"], results["failed"]) == ([config.seed, 7], {})
    assert [row["method"] for row in results["rows"]] == ["weight_average", *["dare"] * 3]
    for rows in zip(results["rows"], other["rows"], one["rows"], strict=True):
        row, *parts = rows
        scores = [part["normalized_accuracy"] for part in parts]
        assert row["normalized_accuracies"] == scores
        np.testing.assert_allclose(row["normalized_accuracy"], np.mean(scores), rtol=1e-12)
        spread = abs(scores[0] - scores[1]) / 2**0.5
        np.testing.assert_allclose(row["normalized_accuracy_std"], spread, rtol=1e-9, atol=1e-15)
        for task, value in row["accuracy"].items():
            want = np.mean([part["accuracy"][task] for part in parts])
            np.testing.assert_allclose(value, want, rtol=1e-12)
    for task, value in results["individual"].items():
        want = (other["individual"][task] + one["individual"][task]) / 2
        np.testing.assert_allclose(value, want, rtol=1e-12)
    page = (tmp_path / "report.html").read_text()
    assert "experts of 2 seeds" in page


def test_rows_that_not_all_seeds_have_are_left_out():
    def results(seed, *names):
        rows = [
            {"entry": name, "accuracy": {"a": 0.5}, "peak_rss_bytes": 1, "commit": f"made {seed}"}
            | dict.fromkeys(
                ("normalized_accuracy", "worst_normalized_accuracy", "accuracy_ratio", "adr"), seed
            )
            | dict.fromkeys(("bytes_per_task", "amr", "seconds_fit"), 1.0)
            for name in names
        ]
        return {
            "rows": rows,
            "failed": {} if "emr" in names else {"emr": "KeyError"},
            "individual": {"a": 1.0},
            "linear_probe": {},
            "checkpoint_set": f"vit-{seed}",
            "identity": str(seed),
            "seconds": {"fit": 2.0},
        }

    merged = compare.over_experts({0: results(0, "ties", "emr"), 3: results(3, "ties")})
    assert [row["entry"] for row in merged["rows"]] == ["ties"]
    assert merged["rows"][0]["normalized_accuracies"] == [0, 3]
    assert merged["rows"][0]["commit"] == "made 0, made 3"
    assert merged["failed"] == {"seed 3: emr": "KeyError"}
    assert merged["seconds"] == {"fit": 4.0}


@pytest.mark.parametrize("seeds", [(1, 1), (-1,), ("a",)])
def test_bad_expert_seeds(tmp_path, seeds):
    config = tiny.get_config()
    config.expert_seeds = seeds
    config.experts.root = str(tmp_path)
    with pytest.raises(ValueError) as error:
        compare.compare(config, tmp_path)
    assert "expected different integers of 0 or more" in str(error.value)
    assert "the experts lie in experts.root" in str(error.value)
