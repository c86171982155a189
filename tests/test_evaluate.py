from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import tiny

from retex_jax import (
    data,
    evaluate,
    experts,
    identification,
    offsets,
    protocols,
    recovery,
    release,
    tree,
)
from retex_jax.identifier import IDENTIFIERS

NAMES = ["first", "second"]
# Heads on two features. first: class 0 if x > y else 1. second: class 0, 1, 2 by -x, x, y.
HEADS = [
    {"kernel": np.array([[1.0, 0.0], [0.0, 1.0]]), "bias": np.zeros(2)},
    {"kernel": np.array([[-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), "bias": np.zeros(3)},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.trained(tmp_path_factory)


@pytest.fixture
def mixed(run):
    """Inputs of all tasks, their true tasks and labels."""
    batch = protocols.mixed_test(run.tasks, seed=0)
    return {"image": batch["image"]}, batch["task"], batch["label"]


def predict(run, inputs):
    released = run.released
    return protocols.predict_unknown(
        run.backbone.model, released.state, released.identifier, inputs, 32
    )


def unknown_rows(run, tasks):
    """Rows with the head known and with nothing known, and the confusion matrix."""
    released, suite = run.released, tiny.suite(run)._replace(tasks=tasks)
    return evaluate.unknown_rows(suite, "v", released.state, released.identifier, 1.5)


@pytest.mark.parametrize("kind", IDENTIFIERS)
def test_any_identifier_is_fitted_and_evaluated(run, kind):
    settings = tiny.settings_with(("identifier.kind", kind), ("identifier.layers", [1, 2]))
    state = run.released.state
    identifier = identification.fit_as_set(
        settings, run.backbone.model, state, run.tasks, jax.random.key(0)
    )
    assert (identifier.kind, identifier.layer) == (kind, (1, 2))
    suite = tiny.suite(run)
    rows, confusion = evaluate.unknown_rows(suite, "v", state, identifier, 1.5)
    method = IDENTIFIERS[kind]
    assert confusion.trace() / confusion.sum() > 0.9  # the tasks differ in brightness
    for row in rows:
        assert row["needs"] == method.needs
        stored = offsets.offset_bytes(state) + tree.param_bytes(identifier.state)
        assert row["bytes_per_task"] == pytest.approx(stored / 3)


def labels_of(images, labels):
    return {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}


# The two protocols, by hand


def test_unknown_protocols_by_hand():
    features = np.array([[2, 1], [2, 1], [1, 2], [-3, 0], [1, 2], [3, 0], [-3, 1]], np.float32)
    # By the first head:   0       0       1        1        1       0        1
    # By the second head:  1       1       2        0        2       1        0
    true_tasks = np.array([0, 0, 0, 0, 1, 1, 1])
    identified = np.array([0, 1, 0, 1, 1, 0, 1], np.int32)
    labels = np.array([0, 0, 0, 1, 2, 1, 2])
    # Own head right:      yes     yes     no       yes      yes     yes      no
    # and task right:      yes     no      no       no       yes     no       no
    with_head, without_head, confusion = protocols.unknown(
        protocols.Unknown(identified, features), HEADS, NAMES, true_tasks, labels
    )
    assert with_head == pytest.approx({"first": 3 / 4, "second": 2 / 3})
    assert without_head == pytest.approx({"first": 1 / 4, "second": 1 / 3})
    np.testing.assert_array_equal(confusion, [[2, 2], [1, 2]])


def test_wrong_task_is_wrong_even_when_its_class_has_the_number_of_the_label():
    features = np.array([[2.0, 1.0]], np.float32)
    prediction = protocols.Unknown(np.array([1, 1], np.int32), np.repeat(features, 2, axis=0))
    # The second head says class 1 to both, and 1 is the label of both, but the first is of another task.
    _, without_head, _ = protocols.unknown(
        prediction, HEADS, NAMES, np.array([0, 1]), np.array([1, 1])
    )
    assert without_head == {"first": 0.0, "second": 1.0}


def test_wrong_task_counts_as_wrong_in_every_metric():
    """The metric of the inputs whose task is identified, times their share."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 2)).astype(np.float32)
    heads = [{"kernel": np.eye(2, dtype=np.float32)}, {"kernel": np.ones((2, 1), np.float32)}]
    true_tasks, identified = np.repeat([0, 1], 30), rng.integers(0, 2, 60).astype(np.int32)
    labels = np.where(true_tasks == 0, rng.integers(0, 2, 60), rng.normal(size=60))
    labels = labels.astype(np.float32)
    with_head, without_head, _ = protocols.unknown(
        protocols.Unknown(identified, features),
        heads,
        NAMES,
        true_tasks,
        labels,
        ["matthews", "pearson_spearman"],
    )
    for task, (name, measure) in enumerate(
        zip(
            NAMES,
            [
                lambda x, y: sklearn.metrics.matthews_corrcoef(y.astype(int), x.argmax(axis=1)),
                lambda x, y: (
                    (np.corrcoef(x[:, 0], y)[0, 1] + scipy.stats.spearmanr(x[:, 0], y).statistic)
                    / 2
                ),
            ],
            strict=True,
        )
    ):
        rows = true_tasks == task
        found = rows & (identified == task)
        outputs = features @ heads[task]["kernel"]
        assert with_head[name] == pytest.approx(measure(outputs[rows], labels[rows]), abs=1e-6)
        want = measure(outputs[found], labels[found]) * found.sum() / rows.sum()
        assert without_head[name] == pytest.approx(want, abs=1e-6)
        assert without_head[name] != pytest.approx(with_head[name], abs=1e-3)


def test_mixed_inputs_are_filled_up_to_the_longest():
    def task(name, length, labels):
        ids = np.full((len(labels), length), length, np.int32)
        arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "label": labels}
        return data.Task(name, ("a", "b"), {"test": arrays}, "", "")

    tasks = [
        task("short", 2, np.array([0, 1, 0], np.int32)),
        task("long", 4, np.array([0.5, 2.5], np.float32)),
    ]
    batch = protocols.mixed_test(tasks, seed=0)
    assert batch["label"].dtype == np.float32
    for index, (length, labels) in enumerate([(2, [0, 0, 1]), (4, [0.5, 2.5])]):
        rows = batch["task"] == index
        assert sorted(batch["label"][rows].tolist()) == labels
        want = [length] * length + [0] * (4 - length)
        assert (batch["input_ids"][rows] == want).all()
        assert batch["attention_mask"][rows].sum() == length * len(labels)
    assert tasks[0].splits["test"]["input_ids"].shape == (3, 2)


def test_methods_that_mix_by_input_refuse_questions(run):
    arrays = {**run.tasks[0].splits["test"], "choice_ids": np.zeros((80, 2, 1), np.int32)}
    asked = data.Task("asked", (), {"test": arrays}, "", "")
    suite = tiny.suite(run)._replace(tasks=[asked, *run.tasks[1:]])
    with pytest.raises(ValueError, match="method: 'twin' gives features of inputs"):
        evaluate.routed_row(suite, "twin", "", None, None, 0.0)


# Nothing that predicts sees the true task


@pytest.mark.parametrize("extra", [["task"], ["label"], ["label", "task"]])
def test_predict_unknown_refuses_task_and_label(run, mixed, extra):
    inputs, true_tasks, labels = mixed
    leaking = {**inputs, **{name: {"task": true_tasks, "label": labels}[name] for name in extra}}
    with pytest.raises(ValueError, match=rf"inputs: got \['{extra[0]}'"):
        predict(run, leaking)


def test_predictions_are_those_of_the_identified_expert(run, mixed):
    inputs, true_tasks, _ = mixed
    prediction = predict(run, inputs)
    assert (prediction.task_ids == true_tasks).mean() > 0.9
    for task in range(3):
        rows = np.flatnonzero(prediction.task_ids == task)
        want = recovery.run(
            run.backbone.model,
            offsets.recover(run.released.state, task),
            data.take(inputs, rows),
            32,
        )
        np.testing.assert_array_equal(prediction.features[rows], want)


def test_whole_evaluation_predicts_the_same_under_permuted_tasks_and_labels(run, monkeypatch):
    seen = []
    real_unknown, real_mixed = protocols.unknown, protocols.mixed_test

    def spy(prediction, *rest):
        seen.append(prediction)
        return real_unknown(prediction, *rest)

    monkeypatch.setattr(protocols, "unknown", spy)
    rows, confusion = unknown_rows(run, run.tasks)
    assert np.trace(confusion) > 0.9 * confusion.sum()

    def permuted(tasks, seed):
        batch = real_mixed(tasks, seed)
        order = np.random.default_rng(7).permutation(len(batch["task"]))
        return {**batch, "task": batch["task"][order], "label": batch["label"][order]}

    monkeypatch.setattr(protocols, "mixed_test", permuted)
    other_rows, other_confusion = unknown_rows(run, run.tasks)
    first, second = seen
    np.testing.assert_array_equal(first.task_ids, second.task_ids)
    np.testing.assert_array_equal(first.features, second.features)
    # The truth did change: what is scored against it did, too.
    assert np.trace(other_confusion) < 0.6 * other_confusion.sum()
    assert other_rows[1]["accuracy"] != rows[1]["accuracy"]


def test_inputs_are_predicted_the_same_whichever_task_they_are_filed_under(run, monkeypatch):
    seen = {}
    real_predict = protocols.predict_unknown

    def spy(model, state, identifier, inputs, batch_size):
        prediction = real_predict(model, state, identifier, inputs, batch_size)
        for image, task, feature in zip(
            inputs["image"], prediction.task_ids, prediction.features, strict=True
        ):
            seen.setdefault(image.tobytes(), []).append((task, feature))
        return prediction

    monkeypatch.setattr(protocols, "predict_unknown", spy)
    unknown_rows(run, run.tasks)
    rotated = [
        data.Task(task.name, task.classes, {"test": other.splits["test"]}, "", "")
        for task, other in zip(run.tasks, run.tasks[1:] + run.tasks[:1], strict=True)
    ]
    rows, confusion = unknown_rows(run, rotated)
    assert np.trace(confusion) < 0.1 * confusion.sum()
    assert rows[1]["identification_accuracy"] < 0.1
    assert all(value < 0.1 for value in rows[1]["accuracy"].values())
    assert len(seen) == 240
    for (task, feature), (other_task, other_feature) in seen.values():
        assert task == other_task
        np.testing.assert_allclose(feature, other_feature, rtol=1e-4, atol=1e-5)


def test_mixed_test_is_shuffled_and_whole(run):
    batch = protocols.mixed_test(run.tasks, seed=0)
    assert [int((batch["task"] == task).sum()) for task in range(3)] == [80, 80, 80]
    assert (np.diff(batch["task"]) != 0).sum() > 100
    for index, task in enumerate(run.tasks):
        rows = batch["task"] == index
        found = labels_of(batch["image"][rows], batch["label"][rows])
        assert found == labels_of(task.splits["test"]["image"], task.splits["test"]["label"])
    other = protocols.mixed_test(run.tasks, seed=1)
    assert (other["task"] != batch["task"]).any()


# With the task known


def test_known_agrees_with_running_each_example_alone(run):
    found = protocols.known(tiny.suite(run), lambda task: offsets.recover(run.released.state, task))
    assert list(found) == list(tiny.NAMES)
    for index, task in enumerate(run.tasks):
        params = offsets.recover(run.released.state, index)
        head = run.released.heads[task.name]
        right = []
        for image, label in zip(
            task.splits["test"]["image"], task.splits["test"]["label"], strict=True
        ):
            features = recovery.run(run.backbone.model, params, {"image": image[None]}, 32)
            right.append(int(np.argmax(features[0] @ head["kernel"] + head["bias"])) == label)
        assert found[task.name] == np.mean(right)


def test_known_gives_each_task_its_own_parameters_and_head():
    """A model whose pooled feature is a parameter: only the right expert and head answer right."""

    def task(name, label):
        test = {"image": np.zeros((4, 8, 8, 3), np.uint8), "label": np.full(4, label, np.int32)}
        return data.Task(name, ("a", "b", "c"), {"test": test}, "", "")

    class Constant:
        config = SimpleNamespace(feature_dim=2)

        def example_batch(self):
            return {"image": 0}

        def apply(self, variables, batch, num_layers=None):
            pooled = jnp.tile(variables["params"]["x"], (len(batch["image"]), 1))
            return SimpleNamespace(pooled=pooled, layers=None)

    experts_by_task = [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
    heads = [
        {"kernel": np.array([[0, 5.0, 0], [9.0, 0, 0]]), "bias": np.zeros(3)},
        {"kernel": np.array([[0, 9.0, 0], [0, 0, 5.0]]), "bias": np.zeros(3)},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            recovery,
            "_apply",
            lambda model, params, batch, n: model.apply({"params": params}, batch),
        )
        tasks = [task("first", 1), task("second", 2)]
        suite = protocols.Suite(Constant(), tasks, heads, {}, batch_size=3, seed=0)
        found = protocols.known(suite, lambda index: {"x": experts_by_task[index]})
    assert found == {"first": 1.0, "second": 1.0}


# The program


def test_program_reproduces_the_rows_of_the_run(run, monkeypatch, capsys):
    printed = {}

    def keep(names, individual, rows):
        printed.update(names=names, individual=individual, rows=rows)

    with tiny.world(run.cache), monkeypatch.context() as patch:
        patch.setattr(evaluate, "_ARTIFACT", SimpleNamespace(value=str(run.workdir)), raising=False)
        patch.setattr(evaluate, "print_results", keep)
        evaluate.main()

    def comparable(rows):
        return [
            {key: value for key, value in row.items() if key != "peak_rss_bytes"}
            for row in rows
            if row["method"] == "retex" and row["variant"] == "exact r=8"
        ]

    assert printed["names"] == list(tiny.NAMES)
    assert printed["individual"] == run.results["individual"]
    assert len(printed["rows"]) == 3
    assert comparable(printed["rows"]) == comparable(run.results["rows"])


def test_release_needs_no_experts(run, monkeypatch, tmp_path):
    """An artifact that was moved elsewhere is evaluated without the experts' folder."""
    rows = []
    with tiny.world(tmp_path / "another cache"), monkeypatch.context() as patch:
        patch.setattr(evaluate, "_ARTIFACT", SimpleNamespace(value=str(run.workdir)), raising=False)
        patch.setattr(evaluate, "print_results", lambda *given: rows.extend(given[-1]))
        patch.setattr(experts.ExpertSet, "from_safetensors", None)
        evaluate.main()
    assert len(rows) == 3


def test_a_changed_release_is_evaluated_by_its_own_names(run, monkeypatch, tmp_path, capsys):
    """One task is added and the first is removed: the others' figures are theirs, as before."""
    released = run.released
    first, *others = tiny.NAMES
    features = np.random.default_rng(0).normal(100, 1, (40, 16)).astype("f4")  # far from all inputs
    added = release.add_task(
        released,
        "new",
        offsets.recover(released.state, 0),
        released.heads[first],
        features,
        budget=2.0**40,
    )
    release.save(tmp_path, release.remove_task(added, first))
    printed = {}

    def keep(names, individual, rows):
        printed.update(names=names, individual=individual, rows=rows)

    with tiny.world(run.cache), monkeypatch.context() as patch:
        patch.setattr(evaluate, "_ARTIFACT", SimpleNamespace(value=str(tmp_path)), raising=False)
        patch.setattr(evaluate, "print_results", keep)
        evaluate.main()
    assert printed["names"] == list(printed["individual"]) == others
    known, head, nothing = printed["rows"]
    (want,) = (
        row
        for row in run.results["rows"]
        if row["variant"] == "exact r=8" and row["task_known"] and row["method"] == "retex"
    )
    assert known["accuracy"] == {name: want["accuracy"][name] for name in others}
    assert list(head["accuracy"]) == list(nothing["accuracy"]) == others
    assert head["identification_accuracy"] > 0.9
    assert known["bytes_per_task"] == offsets.offset_bytes(release.load(tmp_path).state) / 3
    said = capsys.readouterr()
    assert "tasks: ['new'] were added" in said.out + said.err


def test_an_added_task_of_a_removed_ones_name_is_not_taken_for_it(run):
    released, (first, *others) = run.released, tiny.NAMES
    features = np.random.default_rng(0).normal(0, 1, (40, 16)).astype("f4")
    expert, head = offsets.recover(released.state, 0), released.heads[first]
    again = release.add_task(
        release.remove_task(released, first), first, expert, head, features, budget=2.0**40
    )
    assert list(again.heads) == [*others, first]
    assert evaluate.known_tasks(again) == others
    assert list(released.metadata["individual"]) == list(tiny.NAMES)
    for other in others:
        again = release.remove_task(again, other)
    with pytest.raises(ValueError, match=rf"tasks: \['{first}'\] of \['{first}'\] were added"):
        evaluate.known_tasks(again)


def test_tables_say_every_figure(run, capsys):
    evaluate.print_results(tiny.NAMES, run.results["individual"], run.results["rows"])
    printed = capsys.readouterr().out
    for word in (
        *tiny.NAMES,
        "individual",
        "averaged",
        "recovered",
        "routed, own head",
        "nothing known",
        "weight_average",
        "ties",
        "retex exact r=2",
        "retex exact r=8",
        "norm. acc",
        "ident.",
    ):
        assert word in " ".join(printed.split()), word


def test_result_row_by_hand():
    row = evaluate.result_row(
        "m",
        "v",
        {"a": 0.4, "b": 0.9},
        {"a": 0.8, "b": 1.0},
        task_known=True,
        head_known=True,
        needs="none",
        bytes_per_task=25.0,
        model_bytes=100,
        seconds_fit=2.0,
    )
    assert row["normalized_accuracy"] == pytest.approx((0.5 + 0.9) / 2)
    assert row["accuracy_ratio"] == pytest.approx(1.3 / 1.8)
    assert row["adr"] == pytest.approx(1 - 1.3 / 1.8)
    assert row["amr"] == 0.25
    assert row["identification_accuracy"] is None


def test_expert_that_gets_nothing_right_does_not_stop_the_evaluation(run):
    """All the work is done by then; a figure that cannot be computed is no reason to lose it."""
    individual = {**run.results["individual"], "dots": 0.0}
    suite = tiny.suite(run)._replace(individual=individual)
    row = evaluate.known_row(suite, "retex", "v", run.released.state, 1.0)
    assert row["normalized_accuracy"] is None
    assert row["accuracy"]["bars"] > 0.5


def test_model_bytes_are_those_of_one_model(run):
    row = unknown_rows(run, run.tasks)[0][0]
    assert row["amr"] * tree.param_bytes(run.backbone.params) == pytest.approx(
        row["bytes_per_task"]
    )
