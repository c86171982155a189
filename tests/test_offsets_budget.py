import itertools

import numpy as np
import pytest
import references
from expert_sets import MODEL_IDS, MODELS, assert_close, expert_set

import retex_jax as rtx
from retex_jax import tree
from retex_jax.offsets import budget, differences, exact, separate
from retex_jax.offsets.coding import BITS, Coded, code, dense
from retex_jax.offsets.forms import Elementwise, Product, Separate
from retex_jax.offsets.state import LeafPlan

RETEX = rtx.METHODS["retex"]
VIEW = tree.MatrixView((0,), (1,))


def low_rank(shape, num_tasks, seed=0, decay=0.6):
    """[T, a, b] whose singular values fall, with directions of each task's own."""
    rng = np.random.default_rng(seed)
    offsets = []
    for _ in range(num_tasks):
        left, _, right = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
        offsets.append((left * decay ** np.arange(len(right))) @ right)
    return np.array(offsets, np.float32)


def measured(stacks, weights=None):
    return {
        name: budget.spectra(stack, np.ones(len(stack)) if weights is None else weights)
        for name, stack in stacks.items()
    }


def plans_of(stacks):
    return {name: LeafPlan(VIEW, stack.shape[1:], 1) for name, stack in stacks.items()}


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_spectra_are_the_squared_singular_values(shape):
    stack = low_rank(shape, 3)
    weights = np.array([1.0, 2.0, 0.5])
    found = budget.spectra(stack, weights)
    weighted = stack.astype(np.float64) * weights[:, None, None]
    together = np.linalg.svd(weighted.reshape(-1, shape[1]), compute_uv=False) ** 2
    np.testing.assert_allclose(found.shared[: len(together)], together, rtol=1e-4, atol=1e-9)
    for task in range(3):
        own = np.linalg.svd(weighted[task], compute_uv=False) ** 2
        np.testing.assert_allclose(found.separate[task], own, rtol=1e-4, atol=1e-9)


def test_a_leaf_that_is_too_large_is_measured_by_the_range_finder(monkeypatch):
    stack = low_rank((31, 37), 3)
    whole = budget.spectra(stack, np.ones(3)).shared
    budget._stack_spectrum.clear_cache()
    monkeypatch.setattr(exact, "MAX_GRAM", 16)
    monkeypatch.setattr(budget, "_MOST_SHARED", 9)
    found = budget.spectra(stack, np.ones(3)).shared
    budget._stack_spectrum.clear_cache()
    assert found.shape == (9,)
    np.testing.assert_allclose(found, whole[:9], rtol=1e-3)


@pytest.mark.parametrize("sharing", ["shared", "separate"])
def test_ranks_are_the_best_of_all(sharing):
    # Two leaves of different sides, every choice of ranks tried.
    stacks = {"x": low_rank((3, 4), 2), "y": low_rank((2, 6), 2, seed=1, decay=0.8)}
    spectra = measured(stacks)
    for bytes_ in (40, 90, 150, 400):
        found = budget.allocate(plans_of(stacks), spectra, bytes_, sharing=sharing)
        spent, gained = outcome(found, spectra, sharing)
        assert spent <= bytes_
        # What is spent is spent in the best way: no other choice of at most these bytes gains more.
        best = max(
            gain for cost, gain in every_choice(stacks, spectra, sharing) if cost <= spent + 1e-9
        )
        assert gained == pytest.approx(best, rel=1e-9)


def outcome(plans, spectra, sharing):
    cost = gain = 0.0
    for name, plan in plans.items():
        task_side, shared_side = plan.solved_shape
        num_tasks = spectra[name].num_tasks
        if sharing == "shared":
            cost += 4 * plan.rank * (num_tasks * task_side + shared_side)
            gain += spectra[name].shared[: plan.rank].sum()
        else:
            cost += 4 * sum(plan.task_ranks) * (task_side + shared_side)
            gain += sum(
                spectra[name].separate[task, :rank].sum()
                for task, rank in enumerate(plan.task_ranks)
            )
    return cost, gain


def every_choice(stacks, spectra, sharing):
    limits = {name: min(stack.shape[1:]) for name, stack in stacks.items()}
    if sharing == "shared":
        for ranks in itertools.product(*(range(limit + 1) for limit in limits.values())):
            plans = {
                name: LeafPlan(VIEW, stacks[name].shape[1:], rank)
                for name, rank in zip(stacks, ranks, strict=True)
            }
            yield outcome(plans, spectra, sharing)
    else:
        choices = [itertools.product(range(limit + 1), repeat=2) for limit in limits.values()]
        for ranks in itertools.product(*choices):
            plans = {
                name: LeafPlan(VIEW, stacks[name].shape[1:], max(own), task_ranks=own)
                for name, own in zip(stacks, ranks, strict=True)
            }
            yield outcome(plans, spectra, sharing)


def test_auto_shares_what_the_tasks_have_in_common():
    common = low_rank((24, 24), 1)[0]
    stacks = {
        "common": np.stack([common, 0.9 * common, -common]),
        "own": low_rank((24, 24), 3, seed=2),
    }
    found = budget.allocate(plans_of(stacks), measured(stacks), 3000, sharing="auto")
    assert found["common"].task_ranks is None
    assert found["own"].task_ranks is not None


def test_fewer_bits_buy_more_ranks():
    stacks = {"x": low_rank((40, 40), 2, decay=0.95)}
    ranks = [
        budget.allocate(plans_of(stacks), measured(stacks), 3000, bits=bits)["x"].rank
        for bits in (4, 8, 16, 32)
    ]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > 2 * ranks[-1]


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_separate_is_each_tasks_truncated_svd(shape):
    stack = low_rank(shape, 3)
    solution = separate.solve(stack, (2, 0, 7), np.ones(3))
    found = [np.asarray(solution.form.offset(np.eye(3, dtype="f4")[task])) for task in range(3)]
    total = 0.0
    for task, rank in enumerate((2, 0, 7)):
        left, values, right = np.linalg.svd(stack[task].astype(np.float64), full_matrices=False)
        want = (left[:, :rank] * values[:rank]) @ right[:rank]
        np.testing.assert_allclose(found[task], want, rtol=1e-5, atol=1e-5)
        total += np.sum(values[rank:] ** 2)
    assert solution.residual == pytest.approx(total, rel=1e-4)
    assert solution.optimum == pytest.approx(total, rel=1e-6)
    assert solution.energy == pytest.approx(np.sum(stack.astype(np.float64) ** 2), rel=1e-6)


@pytest.mark.parametrize("bits", [bits for bits in BITS if 1 < bits < 32])
def test_coded_separate_residual_is_that_of_what_is_stored(bits):
    stack = low_rank((20, 30), 2, decay=0.9)
    weights = np.array([1.0, 0.5])
    solution = separate.solve(stack, (6, 4), weights, bits)
    assert isinstance(solution.form.left, Coded)
    error = 0.0
    for task in range(2):
        offset = np.asarray(solution.form.offset(np.eye(2, dtype="f4")[task]), np.float64)
        error += weights[task] ** 2 * np.sum((stack[task] - offset) ** 2)
    assert solution.residual == pytest.approx(error, rel=1e-4)
    assert solution.optimum <= solution.residual * (1 + 1e-6) <= solution.energy


def test_refit_makes_up_for_coding():
    # Task factors fitted to the coded shared factor beat those of the exact one, coded.
    stack = low_rank((24, 24), 3, decay=0.9)[None]
    solution = exact.solve_group(stack, 8)
    _, _, refitted = exact.code_group(stack, solution.shared_factor, np.ones(3, "f4"), 2)
    factors = dense(code(solution.task_factors[0], 2, -2))
    shared = dense(code(solution.shared_factor[0], 2, -1))
    plain = np.sum((stack[0] - np.asarray(factors) @ np.asarray(shared)) ** 2)
    assert float(refitted[0]) < plain


@pytest.mark.parametrize(("pretrained", "experts"), MODELS, ids=MODEL_IDS)
@pytest.mark.parametrize("sharing", ["shared", "separate", "auto"])
@pytest.mark.parametrize("bits", [3, 32])
def test_fit_keeps_to_the_budget(pretrained, experts, sharing, bits):
    if bits == 3 and sharing != "auto" and "conv/kernel" in pretrained:
        pretrained, experts = references.few_leaves(2)  # coding is compiled for every shape
    made = expert_set(pretrained, experts)
    options = {"bits": bits, "vector_bits": bits, "orientation": "auto"}
    last = np.inf
    for fraction in (0.2, 0.5, 0.9):
        state = RETEX.fit(made, budget=fraction, sharing=sharing, **options)
        allowed = fraction * len(experts) * tree.param_bytes(made.leaves)
        assert RETEX.extra_bytes(state) <= allowed
        assert state.report.residual <= last * (1 + 1e-3) + 1e-9
        last = state.report.residual
        check_report(state, experts)


def check_report(state, experts):
    """The residuals are those of what is stored."""
    merged = references.flat(state.merged)
    for name in state.report.residuals:
        error = 0.0
        for task, expert in enumerate(experts):
            recovered = references.flat(RETEX.recover(state, task))[name]
            want = np.asarray(expert[name], np.float64)
            error += np.sum((np.asarray(recovered, np.float64) - want) ** 2)
        assert state.report.residuals[name] == pytest.approx(error, rel=1e-2, abs=1e-9), name
    assert merged.keys() >= state.report.residuals.keys()


def test_forms_of_a_budgeted_state():
    pretrained, experts = references.few_leaves(2)
    state = RETEX.fit(
        expert_set(pretrained, experts), budget=0.6, sharing="separate", bits=4, vector_bits=8
    )
    kinds = {type(form) for form in state.offsets.values()}
    assert kinds == {Elementwise, Separate}
    shared = RETEX.fit(expert_set(pretrained, experts), rank=2, orientation="left", bits=8)
    assert {type(form) for form in shared.offsets.values()} == {Elementwise, Product}


@pytest.mark.parametrize("orientation", ["right", "left", "auto"])
def test_orientation_changes_only_what_is_shared(orientation):
    # At full rank every orientation recovers the experts.
    pretrained, experts = MODELS[1]
    state = RETEX.fit(
        expert_set(pretrained, experts), rank=5, rank_rule="clip", orientation=orientation
    )
    assert_close(RETEX.recover(state, 0), experts[0])


@pytest.mark.parametrize(("bits", "slack"), [(32, 1e-5), (8, 1e-2)])
def test_weighted_fit_is_the_best_of_the_weighted_stack(bits, slack):
    stack = low_rank((9, 7), 3, decay=0.8).astype(np.float64)
    pretrained = {"w/kernel": np.zeros((7, 9), "f4")}
    experts = [{"w/kernel": offset.T.astype("f4")} for offset in stack]
    given = np.array([1.0, 3.0, 0.5])
    state = RETEX.fit(
        expert_set(pretrained, experts), rank=2, bits=bits, task_weights=given,
        base=references.nested(pretrained),
    )  # fmt: skip
    weights = given / np.sqrt(np.mean(given**2))
    weighted = stack * weights[:, None, None]
    optimum = np.sum(np.linalg.svd(weighted.reshape(-1, 7), compute_uv=False)[2:] ** 2)
    error = 0.0
    for task, expert in enumerate(experts):
        found = references.flat(RETEX.recover(state, task))["w/kernel"].astype(np.float64)
        error += weights[task] ** 2 * np.sum((found - expert["w/kernel"]) ** 2)
    assert error == pytest.approx(optimum, rel=slack)
    assert state.report.residual == pytest.approx(error, rel=1e-4)
    assert state.report.optimum == pytest.approx(optimum, rel=1e-5)


def test_energy_weights_help_the_small_task():
    rng = np.random.default_rng(0)
    pretrained = {"w/kernel": rng.normal(size=(12, 12)).astype("f4")}
    experts = [
        {"w/kernel": pretrained["w/kernel"] + scale * low_rank((12, 12), 1, seed)[0]}
        for seed, scale in enumerate((1.0, 1.0, 0.01))
    ]
    made = expert_set(pretrained, experts)

    def relative_errors(weights):
        state = RETEX.fit(made, rank=4, task_weights=weights, base=references.nested(pretrained))
        recovered = [references.flat(RETEX.recover(state, task)) for task in range(3)]
        return [
            np.sum((found["w/kernel"] - expert["w/kernel"]) ** 2)
            / np.sum((pretrained["w/kernel"] - expert["w/kernel"]) ** 2)
            for found, expert in zip(recovered, experts, strict=True)
        ]

    assert relative_errors("energy")[2] < 0.5 * relative_errors("equal")[2]
    equal = relative_errors("equal")
    np.testing.assert_allclose(equal, relative_errors([2, 2, 2]), rtol=1e-3)
    np.testing.assert_allclose(equal, relative_errors(np.full(3, 0.1)), rtol=1e-3)


def test_energy_weights_need_the_memory_of_one_task(monkeypatch):
    rng = np.random.default_rng(0)
    models = [{"w/kernel": rng.normal(size=(6, 5)).astype("f4")} for _ in range(4)]
    held, vectors = [], differences.vectors

    def counted(experts, *args):
        held.append(experts.num_tasks)
        return vectors(experts, *args)

    monkeypatch.setattr(differences, "vectors", counted)
    made = expert_set(models[0], models[1:])
    RETEX.fit(made, rank=2, task_weights="energy", stack_bytes=1)
    assert set(held) == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5, "bits": 5}, "bits: got 5"),
        ({"budget": 1e-9, "task_weights": "energy"}, "budget: got 1e-09"),
        ({"rank": 2, "form": "affine"}, "pretrained: got None, which form = 'affine'"),
        ({"rank": 2, "solver": "adam", "objective": "cosine"}, "objective = 'cosine' reads"),
    ],
)
def test_wrong_options_are_told_before_any_leaf_is_read(options, message, monkeypatch):
    experts = [references.nested(expert) for expert in MODELS[0][1]]
    made = rtx.ExpertSet.from_trees(None, experts)
    for read in ("stacked", "expert"):
        monkeypatch.setattr(type(made), read, lambda *_: pytest.fail("a leaf was read"))
    with pytest.raises(ValueError, match=message):
        RETEX.fit(made, **options)


def test_a_budget_of_a_model_without_matrices():
    models = [{"a/bias": np.full(8, task, np.float32)} for task in range(3)]
    state = RETEX.fit(expert_set(models[0], models[1:]), budget=100)
    np.testing.assert_array_equal(references.flat(RETEX.recover(state, 1))["a/bias"], 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5, "rank": 3}, "rank: got 3 beside budget = 0.5"),
        ({"rank": 0}, "rank: got 0, expected an integer from 1"),
        ({"rank": 0, "form": "affine"}, "rank: got 0, expected an integer from 1"),
        ({"budget": -1}, "budget: got -1"),
        ({"sharing": "separate"}, "sharing: got 'separate' without a budget"),
        ({"budget": 0.5, "sharing": "none"}, "sharing: got 'none', expected one of"),
        ({"budget": 1e-9}, "budget: got 1e-09, .* but the leaves below two axes take"),
        ({"task_weights": "size"}, "task_weights: got 'size'"),
        ({"task_weights": [1.0]}, "task_weights: got .*expected 2 positive numbers"),
        ({"task_weights": 1.0}, "task_weights: got 1.0, expected 2 positive numbers"),
        ({"task_weights": [1.0, 0.0]}, "task_weights: got .*expected 2 positive numbers"),
        ({"solver": "adam", "budget": 0.5}, "'adam' takes no budget"),
        ({"bits": 5, "rank": 2}, "bits: got 5"),
        ({"budget": 0.5, "bits": 5}, "bits: got 5"),
        ({"orientation": "up"}, "orientation: got 'up'"),
    ],
)
def test_bad_options(options, message):
    pretrained, experts = MODELS[0]
    with pytest.raises(ValueError, match=message):
        RETEX.fit(expert_set(pretrained, experts), **options)
