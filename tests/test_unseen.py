"""Unseen tasks: heads, rules and the program, at the size of tests/tiny.py."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from retex_jax import (
    collection,
    command_line,
    data,
    evaluate,
    offsets,
    recovery,
)
from retex_jax.experts import ExpertSet
from retex_jax.methods import METHODS
from retex_jax.unseen import __main__ as unseen
from retex_jax.unseen import rules, transfer
from retex_jax.unseen.case import Case, problems, splits

COUNTS = {"train": 24, "val": 8, "test": 20}
METHODS_TRIED = "weight_average,regmean,retex,dts_d"


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """The tiny run, its experts, and settings of few inputs."""
    run = tiny.trained(tmp_path_factory)
    with tiny.world(run.cache):
        collected = collection.collect(run.settings, run.backbone, run.tasks)
    settings = {
        **run.settings,
        "methods": METHODS_TRIED,
        "method_options": {},
        "calibration": {"num_inputs": 8, "batch_size": 8},
        "search": {"enabled": True, "num_inputs": 8},
        "unseen": {
            "num_unseen": 1,
            "num_splits": 2,
            "splits": (),
            "num_train": 24,
            "num_test": 20,
            "temperatures": (0.3, 1.0),
        },
    }
    return run, collected, settings


def case_of(tried, unseen_tasks=("bars",), *, tasks=None, collected=None):
    run, own, settings = tried
    tasks = run.tasks if tasks is None else tasks
    settings = {**settings, "tasks": [task.name for task in tasks]}
    return Case(
        settings, run.backbone, tasks, own if collected is None else collected, unseen_tasks
    )


def relabelled(task, **splits_of):
    """The task with some splits' labels replaced, or without them."""
    parts = dict(task.splits)
    for split, labels in splits_of.items():
        rest = {name: array for name, array in parts[split].items() if name != "label"}
        parts[split] = rest if labels is None else {**rest, "label": labels}
    return dataclasses.replace(task, splits=parts)


def all_predictions(case, text=False):
    """Rule to task to predictions and what else the row tells."""
    found = {}
    for rule in rules.plan(case.settings, text=text):
        made = rule.make(case)
        found[rule.name] = (
            {
                task: transfer.predictions(case.world, made.features, task)
                for task in (*case.seen, *case.unseen)
            },
            made.facts,
        )
    return found


@pytest.fixture(scope="module")
def plain(tried):
    case = case_of(tried)
    return case, all_predictions(case)


def test_prototypes_by_hand():
    features = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]], np.float32)
    head = transfer.prototype_head(features, np.array([0, 0, 1]), 2)
    np.testing.assert_array_equal(head["kernel"], [[1, 0], [0, 4]])
    np.testing.assert_array_equal(head["bias"], [-0.5, -8])
    # Both means are as far from (1, 17 / 8).
    found = recovery.logits(head, np.array([[1, 2.1], [1, 2.15]], np.float32)).argmax(axis=1)
    assert found.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"classes \[0, 2\] have no example"):
        transfer.prototype_head(features, np.array([1, 1, 3]), 4)


def test_prototypes_pick_the_nearest_mean():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)).astype("f4"), np.arange(60) % 4
    inputs = rng.normal(size=(200, 5)).astype("f4")
    head = transfer.prototype_head(features, labels, 4)
    means = [features[labels == label].astype("f8").mean(axis=0) for label in range(4)]
    distances = [np.linalg.norm(inputs.astype("f8") - mean, axis=1) for mean in means]
    np.testing.assert_array_equal(
        recovery.logits(head, inputs).argmax(axis=1), np.argmin(distances, axis=0)
    )


def test_a_world_parts_inputs_from_labels(tried):
    run, collected, _ = tried
    zero_shot = {"projection": {"kernel": np.eye(2)}, "kernel": np.eye(2), "bias": np.zeros(2)}
    heads = {**collected.heads, "rings": zero_shot}
    world = transfer.make_world(
        run.backbone.model, run.tasks, heads, ("bars", "rings"), counts=COUNTS, batch_size=8
    )
    assert (world.seen, world.unseen) == (("dots",), ("bars", "rings"))
    assert set(world.heads) == {"dots", "rings"}
    for task in run.tasks:
        for split, count in COUNTS.items():
            assert set(world.inputs[task.name][split]) == {"image"}
            np.testing.assert_array_equal(
                world.inputs[task.name][split]["image"], task.splits[split]["image"][:count]
            )
            np.testing.assert_array_equal(
                world.labels[task.name][split], task.splits[split]["label"][:count]
            )


def test_classes_without_an_example_are_all_named(tried):
    run, collected, _ = tried
    with pytest.raises(ValueError) as error:
        transfer.make_world(
            run.backbone.model,
            run.tasks,
            collected.heads,
            ("bars", "dots"),
            counts={**COUNTS, "train": 1},
            batch_size=8,
        )
    lines = str(error.value).splitlines()
    assert len(lines) == 4 and all("has no example among the first 1" in line for line in lines)
    assert not any("rings" in line for line in lines)


def test_some_experts_of_a_set(tried):
    _, collected, _ = tried
    experts = collected.experts
    some = experts.take([2, 0])
    assert some.names == ("rings", "dots") and some.num_tasks == 2
    name = experts.float_leaves[0]
    np.testing.assert_array_equal(some.expert(name, 1), experts.expert(name, 0))
    np.testing.assert_array_equal(some.stacked(name), experts.stacked(name)[jnp.array([2, 0])])
    np.testing.assert_array_equal(some.pretrained(name), experts.pretrained(name))
    for bad in ([], [0, 0], [3], [-1]):
        with pytest.raises(ValueError, match="different ids from 0 to 2"):
            experts.take(bad)


def test_nothing_of_unseen_tasks_reaches_a_fit(tried, plain):
    """Not its expert, its expert's head, its validation inputs, or a label of its test inputs."""
    run, collected, _ = tried
    _, want = plain
    bars = relabelled(run.tasks[1], test=None)
    bars = dataclasses.replace(bars, splits={k: v for k, v in bars.splits.items() if k != "val"})
    bars.splits["val"] = {"image": np.zeros((0, 8, 8, 3), np.uint8)}
    trees = [collected.experts.expert_params(task) for task in range(3)]
    trees[1] = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), trees[1])
    experts = ExpertSet.from_trees(
        collected.experts.pretrained_params(),
        trees,
        names=collected.experts.names,
        check_finite=False,
    )
    heads = {**collected.heads, "bars": {"kernel": np.full((16, 3), np.nan)}}
    case = case_of(
        tried,
        tasks=[run.tasks[0], bars, run.tasks[2]],
        collected=collected._replace(experts=experts, heads=heads),
    )
    found = all_predictions(case)
    assert set(found) == set(want) and len(want) == 9
    for name in set(want) - {rules.OWN}:
        assert found[name][1] == want[name][1]
        for task in tiny.NAMES:
            np.testing.assert_array_equal(found[name][0][task], want[name][0][task])


def test_only_the_head_sees_training_labels_of_an_unseen_task(tried, plain):
    run, _, _ = tried
    _, want = plain
    labels = (run.tasks[1].splits["train"]["label"] + 1) % 3
    bars = relabelled(run.tasks[1], train=labels)
    found = all_predictions(case_of(tried, tasks=[run.tasks[0], bars, run.tasks[2]]))
    for name, (classes, facts) in want.items():
        assert found[name][1] == facts
        for task in ("dots", "rings"):
            np.testing.assert_array_equal(found[name][0][task], classes[task])
        np.testing.assert_array_equal(found[name][0]["bars"], (classes["bars"] + 1) % 3)


def test_the_order_of_seen_tasks_changes_nothing(tried, plain):
    run, collected, _ = tried
    _, want = plain
    order = [2, 1, 0]
    tasks = [run.tasks[place] for place in order]
    moved = collected._replace(
        experts=collected.experts.take(order),
        heads={task.name: collected.heads[task.name] for task in tasks},
        individual={task.name: collected.individual[task.name] for task in tasks},
    )
    found = all_predictions(case_of(tried, tasks=tasks, collected=moved))
    for name, (classes, facts) in want.items():
        for task in tiny.NAMES:
            np.testing.assert_array_equal(found[name][0][task], classes[task])
        for task, weights in facts.get("weights", {}).items():
            np.testing.assert_allclose(found[name][1]["weights"][task][::-1], weights, atol=1e-5)


def test_what_seen_tasks_get_is_what_the_suite_has(tried, plain):
    run, collected, _ = tried
    _, found = plain
    merged = METHODS["weight_average"].fit(collected.experts.take([0, 2]))
    for place, task in ((0, "dots"), (2, "rings")):
        inputs = {"image": run.tasks[place].splits["test"]["image"][:20]}
        for name, params in (
            ("weight_average", merged),
            (rules.OWN, collected.experts.expert_params(place)),
            (rules.PRETRAINED, collected.experts.pretrained_params()),
        ):
            features = recovery.run(run.backbone.model, params, inputs, 32)
            classes = recovery.logits(collected.heads[task], features).argmax(axis=1)
            np.testing.assert_array_equal(found[name][0][task], classes)


def test_an_unseen_copy_of_a_seen_task_gets_its_expert(tried):
    run, collected, _ = tried
    copy = dataclasses.replace(run.tasks[0], name="copy")
    trees = [collected.experts.expert_params(task) for task in (0, 1, 2, 1)]
    experts = ExpertSet.from_trees(
        collected.experts.pretrained_params(), trees, names=(*tiny.NAMES, "copy")
    )
    heads = {**collected.heads, "copy": collected.heads["rings"]}
    individual = {**collected.individual, "copy": 1.0}
    case = case_of(
        tried,
        ("copy",),
        tasks=[*run.tasks, copy],
        collected=collected._replace(experts=experts, heads=heads, individual=individual),
    )
    by_name = {rule.name: rule for rule in rules.plan(case.settings)}
    assert (case.scores("copy", "test").argmax(axis=1) == 0).all()
    recovered = offsets.recover(case.offsets[0], 0)
    want = case.world.run(recovered, "copy", "test")
    for kind in ("input", "task"):
        made = by_name[f"retex hard weights, each {kind}"].make(case)
        np.testing.assert_allclose(made.features("copy", "test"), want, rtol=1e-4, atol=1e-5)
        assert made.facts.get("weights", {"copy": [1, 0, 0]}) == {"copy": [1, 0, 0]}
    soft = by_name["retex soft weights, each input"].make(case)
    assert np.abs(soft.features("copy", "test") - want).max() > 1e-3


def test_weights_of_a_task_are_not_of_what_the_identifier_was_fitted_to(tried):
    case = case_of(tried)
    by_name = {rule.name: rule for rule in rules.plan(case.settings)}
    scores, _ = case.scores, (case.unit, case.temperature)
    asked = set()
    case.__dict__["scores"] = lambda task, split: asked.add((task, split)) or scores(task, split)
    want = {*((task, "val") for task in case.seen), *((task, "train") for task in case.unseen)}
    for kind in ("hard", "soft"):
        by_name[f"retex {kind} weights, each task"].make(case)
        assert asked == want
        asked.clear()


def test_mixtures_of_each_input(plain):
    case, _ = plain
    state, world = case.offsets[0], case.world
    weights = np.random.default_rng(0).dirichlet(np.ones(2), 20).astype("f4")
    inputs = world.inputs["dots"]["test"]
    found = transfer.mixed_features(world.model, state, weights, inputs)
    for row in (0, 7, 19):
        params = offsets.mix(state, jnp.asarray(weights[row]))
        want = recovery.run(world.model, params, data.take(inputs, np.array([row])), 1)
        np.testing.assert_allclose(found[row], want[0], rtol=1e-4, atol=1e-5)
    hard = np.eye(2, dtype="f4")[np.arange(20) % 2]
    found = transfer.mixed_features(world.model, state, hard, inputs)
    routed = transfer.routed_features(world, state, lambda task, split: hard)
    np.testing.assert_allclose(found, routed("dots", "test"), rtol=1e-4, atol=1e-5)


def test_temperatures_are_tried_without_the_task_itself(plain):
    case, _ = plain
    seen_only = {task: case.world.inputs[task] for task in case.seen}
    world = dataclasses.replace(case.world, inputs=seen_only)
    calls = []

    def mix(weights):
        calls.append(np.asarray(weights))
        return offsets.mix(case.offsets[0], weights)

    found = transfer.choose_temperature(world, mix, case.scores, (0.1, 5.0))
    np.testing.assert_array_equal(calls, [[0, 1], [1, 0]] * 2)  # of two tasks the other one is left
    accuracy = []
    for place, task in enumerate(case.seen):
        params = offsets.recover(case.offsets[0], 1 - place)
        head = transfer.prototype_head(
            world.run(params, task, "train"), world.labels[task]["train"], 3
        )
        classes = recovery.logits(head, world.run(params, task, "val")).argmax(axis=1)
        accuracy.append((classes == world.labels[task]["val"]).mean())
    assert found == {0.1: np.mean(accuracy), 5.0: np.mean(accuracy)}


def test_the_unit_of_temperatures():
    one, other = np.array([[1.0, 3.0]]), np.array([[0.0, 0.0], [4.0, 12.0]])
    np.testing.assert_allclose(transfer.score_spread([one, other]), np.sqrt((1 + 8) / 2))
    assert transfer.score_spread([np.ones((3, 2))]) == 1.0


def test_zero_shot_heads_take_the_place_of_prototypes_and_give_text_weights(tried):
    run, collected, _ = tried
    rng = np.random.default_rng(1)
    heads = {
        task: {"projection": {"kernel": np.eye(16, dtype="f4")}, "kernel": kernel}
        for task, kernel in zip(tiny.NAMES, rng.normal(1, 1, (3, 16, 3)).astype("f4"), strict=True)
    }
    zero_shot = collected._replace(heads=heads)
    assert rules.has_text(run.backbone, zero_shot) and not rules.has_text(run.backbone, collected)
    tasks = [run.tasks[0], relabelled(run.tasks[1], train=None), run.tasks[2]]
    case = case_of(tried, tasks=tasks, collected=zero_shot)
    means = {task: head["kernel"].astype("f8").mean(axis=1) for task, head in heads.items()}
    cosines = [
        means["bars"] @ means[task] / np.linalg.norm(means["bars"]) / np.linalg.norm(means[task])
        for task in ("dots", "rings")
    ]
    want = np.array(cosines) / sum(cosines)
    np.testing.assert_allclose(case.text_weights["bars"], want, rtol=1e-5)
    by_name = {rule.name: rule for rule in rules.plan(case.settings)}
    made = by_name["retex weights by class names"].make(case)
    state = case.offsets[0]
    for task, params in (
        ("bars", offsets.mix(state, jnp.asarray(want, jnp.float32))),
        ("rings", offsets.recover(state, 1)),
    ):
        features = case.world.run(params, task, "test")
        np.testing.assert_allclose(made.features(task, "test"), features, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(
            transfer.predictions(case.world, made.features, task),
            recovery.logits(heads[task], features).argmax(axis=1),
        )
    dts = by_name["dts_d weights by class names"].make(case)
    state = METHODS["dts_d"].fit(collected.experts.take([0, 2]))
    features = case.world.run(METHODS["dts_d"].mix(state, want), "bars", "test")
    np.testing.assert_allclose(dts.features("bars", "test"), features, rtol=1e-4, atol=1e-5)


def test_models_that_read_texts_embed_class_names(tried):
    """Pictures of texts stand for what a text model reads."""
    run, collected, _ = tried
    params = collected.experts.pretrained_params()

    def encode(texts):
        assert isinstance(texts, list)
        pictures = [np.full((8, 8, 3), 40 * len(text), np.uint8) for text in texts]
        return {"image": np.stack(pictures)}

    tasks = [dataclasses.replace(task, classes=("a", "bcd")) for task in run.tasks[:2]]
    world = case_of(tried).world
    found = transfer.text_embeddings(world, tasks, params, encode)
    assert set(found) == {"dots", "bars"}
    want = recovery.run(world.model, params, encode(["a", "bcd"]), 32)
    np.testing.assert_allclose(found["dots"], want, rtol=1e-5, atol=1e-6)
    assert transfer.text_embeddings(world, tasks, params, None) is None


def test_rules_without_text_and_with_other_methods(tried):
    settings = {
        **tried[2],
        "methods": "dare,ties,dts_t,emr",
        "method_options": {"ties": {"density": 0.5}},
    }
    with_text = [rule.name for rule in rules.plan(settings)]
    assert with_text == [
        "pretrained",
        "ties density=0.5, merge=mean, scaling=1.0",
        "dare drop=0.5, merge=ties",
        "dts_t weights by class names",
        "own expert",
    ]
    assert [rule.name for rule in rules.plan(settings, text=False)] == [
        *with_text[:3],
        "own expert",
    ]


def with_unseen(**changes):
    settings = command_line.as_dict(tiny.get_config())
    settings["tasks"] = [f"t{number}" for number in range(8)]
    return {**settings, "unseen": {**settings["unseen"], **changes}}


def test_splits_leave_every_task_out_equally_often():
    found = splits(with_unseen())
    assert len(found) == 4 and sorted(sum(found, ())) == [f"t{number}" for number in range(8)]
    settings = with_unseen(num_unseen=3, num_splits=8)
    found = splits(settings)
    assert len(set(found)) == 8 and {len(split) for split in found} == {3}
    assert {sum(found, ()).count(task) for task in settings["tasks"]} == {3}
    moved = {**settings, "tasks": settings["tasks"][::-1]}
    assert [split[::-1] for split in splits(moved)] == found
    assert splits({**settings, "seed": 1}) != found
    assert len(set(splits(with_unseen(num_unseen=7, num_splits=8)))) == 8
    assert splits(with_unseen(splits=[["t3", "t1"]])) == [("t1", "t3")]


def test_all_problems_are_listed(tmp_path):
    bad = with_unseen(
        num_unseen=8,
        num_splits=0,
        splits=[["t1", "t1"], ["t9"]],
        num_train=0,
        num_test=0,
        temperatures=(1.0, 0.0),
    )
    bad |= {"expert_seeds": (1,), "methods": "tie"}
    lines = problems(bad)
    for part in (
        "unseen.num_splits: got 0",
        "unseen.num_train: got 0",
        "unseen.num_test: got 0",
        "unseen.num_unseen: got 8, expected 1 to 7",
        "unseen.splits: got ['t1', 't1']",
        "unseen.splits: got ['t9']",
        "unseen.temperatures: got (1.0, 0.0)",
        "expert_seeds: got (1,)",
        "methods: got ['tie']",
    ):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 9
    assert problems(with_unseen()) == []
    assert "expected different numbers" in problems(with_unseen(temperatures=(1.0, 1)))[0]
    assert "no two of the same" in problems(with_unseen(splits=[["t1"], ["t1"]]))[0]
    assert "at most 28" in problems(with_unseen(num_splits=29))[0]
    asked = {**with_unseen(), "tasks": ("cola", "stsb", "mmlu", "rte")}
    assert problems(asked) == [
        "tasks: ['stsb', 'mmlu'] have no classes, expected tasks of classification"
    ]
    older = {name: value for name, value in with_unseen().items() if name != "unseen"}
    assert problems(older) == ["the experiment lacks unseen; see configs/common.py"]
    config = tiny.get_config()
    config.unseen.num_test, config.offsets.rank = 0, 0
    with pytest.raises(ValueError) as error:
        unseen.evaluate_unseen(config, tmp_path)
    assert "unseen.num_test: got 0" in str(error.value) and "offsets.rank" in str(error.value)


def test_means_over_splits():
    def part(method, unseen_accuracy, seen):
        told = {"method": method, "variant": "", "needs": "none", "seconds_fit": 1.0}
        sizes = {"bytes_per_task": 2.0, "model_bytes": 8}
        return {**told, **sizes, "unseen": unseen_accuracy, "seen": seen}

    own, floor = rules.OWN, rules.PRETRAINED
    rows = {
        floor: [part(floor, {"a": 0.5, "b": 0.3}, {"c": 0.4}), part(floor, {"c": 0.2}, {"a": 0.5})],
        "x": [part("x", {"a": 0.6, "b": 0.4}, {"c": 0.4}), part("x", {"c": 0.6}, {"a": 0.6})],
        own: [part(own, {"a": 0.8, "b": 0.8}, {"c": 0.8}), part(own, {"c": 1.0}, {"a": 0.8})],
    }
    _, x, best = unseen.summaries(rows)
    assert x["accuracy"] == {"a": 0.6, "b": 0.4, "c": 0.6}
    np.testing.assert_allclose(x["unseen_accuracy"], 0.55)
    np.testing.assert_allclose(x["gain"], (0.1 + 0.4) / 2)
    t_quantile = 12.706204736174698  # Student's t of 1 degree of freedom, 97.5%
    np.testing.assert_allclose(x["gain_interval"], t_quantile * 0.3 / 2)
    np.testing.assert_allclose(x["normalized_accuracies"], [0.625, 0.6])
    np.testing.assert_allclose(x["seen_normalized_accuracy"], (0.5 + 0.75) / 2)
    np.testing.assert_allclose((x["amr"], x["seen_accuracy"]), (0.25, 0.5))
    assert (best["normalized_accuracy"], best["seen_normalized_accuracy"]) == (1.0, 1.0)
    (alone,) = unseen.summaries({"x": rows["x"]})
    assert alone["gain"] is None and alone["normalized_accuracy"] is None
    assert evaluate.spread([0.5]) == (None, None) and evaluate.spread([0.5, None]) == (None, None)


def test_the_program_goes_on_where_it_was(tried, tmp_path, monkeypatch, capsys):
    run, _, settings = tried
    config = tiny.get_config()
    config.unseen = {**settings["unseen"], "temperatures": (1.0,)}
    config.methods = "weight_average,retex"
    make_row, made, failing = unseen.make_row, [], ["weight_average"]

    def stops(case, rule, clock):
        if len(made) == 9:
            raise KeyboardInterrupt
        made.append((case.name, rule.name))
        if rule.name in failing:
            failing.clear()
            raise KeyError("no leaf")
        return make_row(case, rule, clock)

    names = [rule.name for rule in rules.plan(command_line.as_dict(config), text=False)]
    path = tmp_path / "results.json"
    monkeypatch.setattr(unseen, "make_row", stops)
    with tiny.world(run.cache):
        with pytest.raises(KeyboardInterrupt):
            unseen.evaluate_unseen(config, tmp_path)
        before = json.loads(path.read_text())
        first, second = [split["name"] for split in before["splits"]]
        assert len(names) == 8 and made == [*((first, name) for name in names), (second, names[0])]
        assert before["failed"] == {f"without {first}: weight_average": "KeyError: 'no leaf'"}
        assert [row["rule"] for row in before["rows"]] == names[:1]
        made.clear()
        results = unseen.evaluate_unseen(config, tmp_path)
        assert made == [(first, "weight_average"), *((second, name) for name in names[1:])]
        made.clear()
        config.unseen.splits = ((second,),)
        alone = unseen.evaluate_unseen(config, tmp_path)
        assert not made and alone["splits"] == results["splits"][1:]
        config.unseen.splits = ()
        again = unseen.evaluate_unseen(config, tmp_path)
        assert not made and again["rows"] == results["rows"] and not again["others"]
        other = {**again, "individual": dict.fromkeys(again["individual"], 0.5)}
        path.write_text(json.dumps(other))  # as of another machine
        with pytest.raises(ValueError, match=r"relative to experts of accuracies .*: 0\.5"):
            unseen.evaluate_unseen(config, tmp_path)
        assert json.loads(path.read_text()) == other
        path.write_text(json.dumps(again))
    captured = capsys.readouterr()
    assert f"kept {len(names)} rows" in captured.err and "no text tower is at hand" in captured.err
    assert (
        "over pretrained" in captured.out and "test accuracy of tasks while unseen" in captured.out
    )
    assert again == json.loads(path.read_text()) and results["failed"] == {}
    assert [row["rule"] for row in results["rows"]] == names
    for split, kept in zip(results["splits"], before["splits"], strict=True):
        for name, row in kept["rows"].items():
            assert split["rows"][name] == row
        assert set(split["rows"]["pretrained"]["unseen"]) == {split["name"]}
        assert set(split["rows"]["pretrained"]["seen"]) == set(split["seen"])


def test_a_class_without_an_example_stops_the_program_before_any_fit(tried, tmp_path, monkeypatch):
    run, _, settings = tried
    config = tiny.get_config()
    config.unseen = {**settings["unseen"], "num_train": 1}
    monkeypatch.setattr(unseen, "make_row", None)
    with (
        tiny.world(run.cache),
        pytest.raises(ValueError, match=r"unseen\.num_train: class .* has no example"),
    ):
        unseen.evaluate_unseen(config, tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_damaged_rows_are_made_again(tried, tmp_path, capsys):
    run, _, settings = tried
    config = tiny.get_config()
    config.unseen = {**settings["unseen"], "temperatures": (1.0,)}
    config.methods, path = "weight_average", tmp_path / "results.json"
    with tiny.world(run.cache):
        whole = unseen.evaluate_unseen(config, tmp_path)
    settings = command_line.as_dict(config)
    kept = unseen.previous(path, settings)
    first = whole["splits"][0]
    assert list(kept) == [split["name"] for split in whole["splits"]]

    def changed(change):
        results = json.loads(json.dumps(whole))
        change(results)
        path.write_text(json.dumps(results))
        capsys.readouterr()
        found = unseen.previous(path, settings)
        assert found or "damaged, and is replaced" in capsys.readouterr().err
        return found

    def another_accuracy(results):
        results["splits"][0]["rows"]["weight_average"]["unseen"][first["name"]] += 2**-20

    assert not changed(another_accuracy)
    assert not changed(lambda results: results["splits"][0].update(name="other"))
    assert not changed(lambda results: results["others"].update(other={}))
    for name, value in (("splits", None), ("splits", [None]), ("others", [])):
        assert not changed(lambda results, name=name, value=value: results.update({name: value}))
        without = {name: value}
        assert not changed(
            lambda results, without=without: (results.pop("sha256"), results.update(without))
        )
    assert changed(lambda results: results.pop("sha256")) == kept  # of before there were hashes
    assert changed(lambda results: results.update(seconds={})) == kept
