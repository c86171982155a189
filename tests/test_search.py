import jax
import numpy as np
import pytest
import references

import retex_jax as rtx
from retex_jax import search
from retex_jax.mergers import task_arithmetic


def _expert_set(num_tasks=2):
    pretrained, experts = references.few_leaves(num_tasks)
    return rtx.ExpertSet.from_trees(
        references.nested(pretrained), [references.nested(expert) for expert in experts]
    )


def _echo(experts, *, key=None, **options):
    return options


def test_the_best_is_found_and_all_are_listed():
    calls = []
    result = search.grid(
        _echo,
        _expert_set(),
        {"a": (1, 2, 3), "b": (0.5, 0.25)},
        lambda state: -((state["a"] - 2) ** 2) - state["b"],
        progress=lambda *call: calls.append(call),
    )
    assert result.options == {"a": 2, "b": 0.25}
    assert result.score == -0.25
    assert [tuple(trial.options.values()) for trial in result.trials] == [
        (1, 0.5),
        (1, 0.25),
        (2, 0.5),
        (2, 0.25),
        (3, 0.5),
        (3, 0.25),
    ]
    assert [trial.score for trial in result.trials] == [-1.5, -1.25, -0.5, -0.25, -1.5, -1.25]
    assert calls == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(("values", "want"), [((3, 1, 2), 3), ((2, 1, 3), 2), ((0, 3, 1), 3)])
def test_ties_go_to_the_first_in_the_order_of_the_grid(values, want):
    result = search.grid(_echo, _expert_set(), {"a": values}, lambda state: min(state["a"], 1))
    assert result.options == {"a": want}


def test_key_and_fixed_options_reach_every_fit():
    key, seen = jax.random.key(3), []

    def fit(experts, *, key, first, second):
        seen.append((key, first, second))
        return first

    search.grid(fit, _expert_set(), {"first": (1, 2)}, float, key=key, fixed={"second": "x"})
    assert seen == [(key, 1, "x"), (key, 2, "x")]


def test_a_candidate_that_fails_is_recorded_and_skipped():
    def score(params):
        return -abs(float(params["scale"]))

    result = search.grid(
        task_arithmetic.fit, _expert_set(), {"scaling": (np.nan, 0.5, np.inf, 0.0)}, score
    )
    errors = [trial.error for trial in result.trials]
    assert errors[1] is None and errors[3] is None
    assert "scaling: got nan, expected a finite number" in errors[0]
    assert "scaling: got inf" in errors[2]
    assert [trial.score is None for trial in result.trials] == [True, False, True, False]
    assert result.score == max(trial.score for trial in result.trials if trial.error is None)
    assert np.isfinite(result.options["scaling"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, [], [0.5, np.nan], [[1.0]]])
def test_a_score_that_is_not_finite_numbers_is_skipped(bad):
    result = search.grid(
        _echo, _expert_set(), {"a": (1, 2)}, lambda state: bad if state["a"] == 1 else 0.0
    )
    assert result.options == {"a": 2}
    assert "expected finite numbers" in result.trials[0].error


def test_all_failing_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match=r"(?s)no candidate.*scaling': nan.*scaling': inf"):
        search.grid(
            task_arithmetic.fit, _expert_set(), {"scaling": (np.nan, np.inf)}, lambda params: 0.0
        )


@pytest.mark.parametrize("error", [RuntimeError, FloatingPointError, TypeError])
def test_other_errors_are_not_swallowed(error):
    def fit(experts, *, key, a):
        raise error("broken")

    with pytest.raises(error, match="broken"):
        search.grid(fit, _expert_set(), {"a": (1,)}, float)


def test_an_empty_grid_scores_the_defaults():
    result = search.grid(task_arithmetic.fit, _expert_set(), {}, lambda params: 0.5)
    assert result.options == {}
    assert result.score == 0.5
    assert len(result.trials) == 1


def test_wrong_grids():
    for values, fixed, match in (
        ({"a": (), "b": "xy"}, {}, r"(?s)a has \(\).*b has 'xy'"),
        ({"a": (1,), "key": (2,)}, {"a": 1}, r"(?s)fixed: a is also.*fixed: key is also"),
    ):
        with pytest.raises(ValueError, match=match):
            search.grid(_echo, _expert_set(), values, float, fixed=fixed)


def test_one_score_a_task():
    # Task 0 wants a = 1, task 1 wants a = 3, and their mean is best at 2; b shifts both.
    def score(state):
        return [-((state["a"] - 1) ** 2) + state["b"], -((state["a"] - 3) ** 2) + state["b"]]

    result = search.grid(_echo, _expert_set(), {"a": (1, 2, 3), "b": (0.0, 0.5)}, score)
    assert result.options == {"a": 2, "b": 0.5}
    assert result.score == -0.5
    assert result.per_task("a") == (1, 3)
    assert result.per_task("b") == (0.5, 0.5)
    assert result.trials[0].task_scores == (0.0, -4.0)
    with pytest.raises(ValueError, match="option: got 'c'"):
        result.per_task("c")


def test_per_task_ties_go_to_the_first_and_failures_are_left_out():
    def score(state):
        if state["a"] == 5:
            raise ValueError("no")
        return np.array([1.0, float(state["a"] == 3)])

    result = search.grid(_echo, _expert_set(), {"a": (5, 2, 3, 3)}, score)
    assert result.options == {"a": 3}
    assert result.per_task("a") == (2, 3)


def test_per_task_needs_one_score_a_task():
    result = search.grid(_echo, _expert_set(), {"a": (1, 2)}, lambda state: 1.0)
    assert result.trials[0].task_scores == ()
    with pytest.raises(ValueError, match="expected one a task"):
        result.per_task("a")
    one = search.grid(_echo, _expert_set(1), {"a": (1, 2)}, lambda state: [state["a"]])
    assert one.per_task("a") == (2,)
    with pytest.raises(ValueError, match=r"returned \[0, 2\] numbers"):
        search.grid(
            _echo,
            _expert_set(),
            {"a": (1, 2)},
            lambda state: 1.0 if state["a"] == 1 else [1.0, 1.0],
        )


def test_per_task_lambdas_of_tall_mask_are_the_search_over_all_tuples():
    experts = _expert_set(2)
    tall_mask = rtx.METHODS["tall_mask"]
    targets = [experts.expert_params(task) for task in range(2)]

    def score(state):
        return [
            -sum(
                float(np.abs(np.asarray(one, np.float64) - two).sum())
                for one, two in zip(
                    jax.tree.leaves(tall_mask.recover(state, task)),
                    jax.tree.leaves(targets[task]),
                    strict=True,
                )
            )
            for task in range(2)
        ]

    values = (0.1, 0.5, 2.0, 6.0)
    result = search.grid(tall_mask.fit, experts, {"mask_lambda": values}, score)
    pairs = [(first, second) for first in values for second in values]
    every = search.grid(tall_mask.fit, experts, {"mask_lambda": pairs}, score)
    assert result.per_task("mask_lambda") == every.options["mask_lambda"]


def test_default_grids_are_the_published_ones_and_their_options_exist():
    grids = search.default_grids()
    tenths = {"task_arithmetic": (1, 10), "ties": (8, 25)}
    for name, (first, last) in tenths.items():
        want = [float(f"{tenth // 10}.{tenth % 10}") for tenth in range(first, last + 1)]
        assert list(grids[name]["scaling"]) == want
    assert grids["dare"] == {"drop": (0.1, 0.3, 0.5, 0.7, 0.9)}
    assert grids["tall_mask"] == {"mask_lambda": (0.2, 0.3, 0.4, 0.5, 0.6)}
    assert set(grids["consensus"]) == {"mask_lambda", "scaling"}
    experts = _expert_set(2)
    for name, grid in grids.items():
        first = {option: values[:1] for option, values in grid.items()}
        result = search.grid(rtx.METHODS[name].fit, experts, first, lambda state: 1.0)
        assert result.trials[0].error is None


def test_the_published_grid_of_a_method_with_options():
    grids = search.default_grids()
    assert search.published_grid("ties", {"merge": "mean"}) == grids["ties"]
    assert search.published_grid("ties", {"merge": "sum"}) == grids["task_arithmetic"]
    assert search.published_grid("emr", {}) == {}
    assert search.published_grid("tall_mask", {}, fixed=["mask_lambda"]) == {}
    left = search.published_grid("consensus", {}, fixed=["scaling", "k"])
    assert left == {"mask_lambda": grids["consensus"]["mask_lambda"]}


def test_only_tall_mask_has_one_lambda_a_task():
    def score(state):
        return [-abs(state["mask_lambda"] - want) for want in (0.2, 0.5)]

    values = {"mask_lambda": (0.2, 0.35, 0.5)}
    result = search.grid(_echo, _expert_set(), values, score)
    assert search.chosen_options("tall_mask", result) == {"mask_lambda": (0.2, 0.5)}
    assert search.chosen_options("consensus", result) == {"mask_lambda": 0.2}
    other = search.grid(_echo, _expert_set(), {"coefficient": (1.0, 2.0)}, lambda state: [0.0, 0.0])
    assert search.chosen_options("tall_mask", other) == {"coefficient": 1.0}
