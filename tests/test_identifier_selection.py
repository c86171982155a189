import numpy as np
import pytest
import references_identifier as ref

from retex_jax.identifier import IDENTIFIERS, selection


def _noisy(noise, seed, num_tasks=3):
    """Clouds a task; `noise` hides their means, which are the same for every seed."""
    means = 3 * np.random.default_rng(99).normal(size=(num_tasks, 6))
    rng = np.random.default_rng(seed)
    return [np.float32(mean + noise * rng.normal(size=(24, 6))) for mean in means]


def _by_layer(seed, noises):
    return {
        layer: _noisy(noise, 10 * seed + place)
        for place, (layer, noise) in enumerate(noises.items())
    }


NOISES = {0: 0.1, 1: 30.0, 2: 3.0, 3: 0.1}


def test_the_best_layer_wins_and_earlier_ones_win_ties():
    calibration, validation = (_by_layer(seed, NOISES) for seed in (1, 2))
    found = selection.select("shared_mahalanobis", calibration, validation, {})
    assert found.options == {"layer": 3}  # as good as the pooled output, which comes after it
    assert found.score == 1
    assert [trial.options["layer"] for trial in found.trials] == [1, 2, 3, 0]
    scores = [trial.score for trial in found.trials]
    assert scores[0] < scores[1] < 1
    assert scores[2:] == [1, 1]


def test_scores_are_the_mean_accuracy_of_the_tasks():
    calibration, validation = (_by_layer(seed, {2: 3.0}) for seed in (1, 2))
    validation[2][1] = validation[2][1][:5]  # tasks count the same
    found = selection.select("subspace", calibration, validation, {"rank": [1, 2]})
    method = IDENTIFIERS["subspace"]
    for trial in found.trials:
        state = method.fit(calibration[2], rank=trial.options["rank"])
        each = [
            (np.asarray(method.scores(state, x)).argmax(axis=1) == task).mean()
            for task, x in enumerate(validation[2])
        ]
        np.testing.assert_allclose(trial.task_scores, each)
        assert trial.score == pytest.approx(np.mean(each))
    assert found.score == max(trial.score for trial in found.trials)


def test_several_layers_at_once():
    calibration, validation = (_by_layer(seed, {1: 3.0, 2: 3.0}) for seed in (1, 2))
    layers = [(1, 2), 2, 1]
    found = selection.select("shared_mahalanobis", calibration, validation, {}, layers=layers)
    assert [trial.options["layer"] for trial in found.trials] == [1, 2, (1, 2)]
    assert found.options == {"layer": (1, 2)}
    method = IDENTIFIERS["shared_mahalanobis"]

    def stacked(features):
        return [np.stack(pair, axis=1) for pair in zip(features[1], features[2], strict=True)]

    state = method.fit(stacked(calibration))
    each = [
        (np.asarray(method.scores(state, x)).argmax(axis=1) == task).mean()
        for task, x in enumerate(stacked(validation))
    ]
    assert found.score == pytest.approx(np.mean(each))


def test_layers_worth_trying():
    assert selection.candidates([0, 1, 2, 3]) == [0, 1, 2, 3, (1, 2), (1, 2, 3)]
    assert selection.candidates([3, 1]) == [1, 3, (1, 3)]
    assert selection.candidates([0]) == [0]


def test_cost_of_layers_in_forward_passes():
    for layer, want in ((3, 0.5), (0, 1), ((1, 2), 1 / 3), ((0, 2), 1), ((2, 6), 1)):
        assert selection.forward_fraction(layer, 6) == pytest.approx(want)
        assert selection.forward_fraction(layer, 6, 8) == pytest.approx(8 * want)


def test_the_best_of_some_layers():
    calibration, validation = (_by_layer(seed, NOISES) for seed in (1, 2))
    found = selection.select("shared_mahalanobis", calibration, validation, {})
    assert selection.best_trial(found).options == found.options == {"layer": 3}
    best = selection.best_trial(found, lambda layer: layer in (1, 2))
    assert (best.options, best.score) == ({"layer": 2}, found.trials[1].score)
    assert selection.best_trial(found, lambda layer: False) is None


def test_joint_is_tried_where_there_are_several_layers():
    calibration, validation = (_by_layer(seed, {1: 3.0, 2: 3.0}) for seed in (1, 2))
    layers, grid = [1, (1, 2)], {"joint": [False, True]}
    found = selection.select("shared_mahalanobis", calibration, validation, grid, layers=layers)
    assert [trial.score is None for trial in found.trials] == [False, True, False, False]
    assert "joint: the features are of one layer" in found.trials[1].error


def test_joint_is_not_tried_where_its_covariance_would_be_too_large(monkeypatch):
    calibration, validation = (_by_layer(seed, {1: 3.0, 2: 3.0}) for seed in (1, 2))
    grid = {"joint": [False, True]}
    for most, is_tried in ((12, True), (11, False)):
        monkeypatch.setattr(selection, "MOST_JOINT", most)
        found = selection.select(
            "shared_mahalanobis", calibration, validation, grid, layers=[(1, 2)]
        )
        assert [trial.score is not None for trial in found.trials] == [True, is_tried]
    assert found.trials[1].error == "joint: got 12 features, expected at most 11"


def test_what_cannot_be_fitted_is_recorded():
    calibration, validation = (_by_layer(seed, {1: 1.0}) for seed in (1, 2))
    found = selection.select("subspace", calibration, validation, {"rank": [6, 2]})
    assert found.options == {"layer": 1, "rank": 2}
    assert found.trials[0].score is None
    assert "rank: got 6" in found.trials[0].error
    with pytest.raises(ValueError, match="no candidate could be scored"):
        selection.select("subspace", calibration, validation, {"rank": [6]})


def test_default_grids_fixed_options_and_progress():
    calibration, validation = (_by_layer(seed, {1: 1.0, 2: 1.0}) for seed in (1, 2))
    assert selection.GRIDS.keys() == IDENTIFIERS.keys()
    for name, grid in selection.GRIDS.items():
        assert set(grid) <= set(IDENTIFIERS[name].options)
    calls = []
    found = selection.select(
        "neighbors",
        calibration,
        validation,
        fixed={"score": "distance"},
        progress=lambda done, total: calls.append((done, total)),
    )
    assert len(found.trials) == 2 * 4 * 2
    assert calls[-1] == (16, 16)
    assert {trial.options["k"] for trial in found.trials} == {1, 5, 10, 20}


def test_experts_features():
    calibration, validation = (_by_layer(seed, {1: 0.5, 2: 2.0}) for seed in (1, 2))
    everyone = {
        layer: [np.stack([x] * 3) for x in features] for layer, features in validation.items()
    }
    found = selection.select("mahalanobis", calibration, everyone, {}, layers=[1, (1, 2)])
    assert found.options == {"layer": 1}
    assert found.score > 0.9


def test_all_problems_are_listed_at_once():
    calibration, validation = (_by_layer(seed, {1: 1.0, 2: 1.0}) for seed in (1, 2))
    del validation[2], validation[1][0]
    with pytest.raises(ValueError, match="grid") as error:
        selection.select(
            "subspace",
            calibration,
            validation,
            {"rnak": [1]},
            layers=[1, (1, 2), 5, ()],
            fixed={"k": 1},
        )
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "grid",
        "fixed",
        "layers",
        "layers",
        "layers",
        "calibration, validation",
    ]
    with pytest.raises(ValueError, match=r"kind: got 'subspce'.*did you mean 'subspace'"):
        selection.select("subspce", calibration, validation)


def test_the_key_reaches_the_fit():
    calibration, validation = (_by_layer(seed, {1: 6.0}) for seed in (1, 2))
    fast = {"fixed": {"epochs": 1}}
    one, again = (
        selection.select("router", calibration, validation, {"kind": ["linear"]}, **fast)
        for _ in range(2)
    )
    assert one.trials == again.trials


def test_references_are_separable():
    """So that a layer of little noise identifies all."""
    x = _noisy(0.1, 1)
    assert (
        ref.shared_scores(x, np.concatenate(x), 0.1).argmax(axis=1) == np.repeat(range(3), 24)
    ).all()
