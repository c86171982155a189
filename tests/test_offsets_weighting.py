"""Weights of tasks and leaves by what the predictions lose, against their definitions in float64."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import references
from expert_sets import expert_set

import retex_jax as rtx
from retex_jax import offsets, tree
from retex_jax.calibration import Calibration
from retex_jax.offsets import bases, weighting

RETEX = rtx.METHODS["retex"]
NUM_TASKS, WIDTH = 3, 16
GAINS = (0.3, 1.0, 12.0)  # of logits: the last task's predictions are lost first
BUDGET = {"budget": 0.35, "bits": 3, "sharing": "auto", "orientation": "auto"}


def linear_experts():
    """Three experts of one kernel, whose offsets are as large as each other."""
    rng = np.random.default_rng(0)
    pretrained = {"w/kernel": rng.normal(size=(WIDTH, WIDTH)).astype("f4")}
    experts = [
        {"w/kernel": pretrained["w/kernel"] + 0.3 * rng.normal(size=(WIDTH, WIDTH)).astype("f4")}
        for _ in range(NUM_TASKS)
    ]
    return pretrained, experts


def inputs():
    rng = np.random.default_rng(1)
    return [rng.normal(size=(40, WIDTH)).astype("f4") for _ in range(NUM_TASKS)]


def calibration(examples, size=8):
    return Calibration(
        batches=[[{"x": x[i : i + size]} for i in range(0, len(x), size)] for x in examples],
        features=lambda params, batch: batch["x"] @ params["w"]["kernel"],
        logits=lambda params, gain, batch: gain * (batch["x"] @ params["w"]["kernel"]),
        heads=GAINS[: len(examples)],
    )


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def losses(experts, recovered, examples):
    """K_t of models of one kernel."""
    found = []
    for gain, expert, other, x in zip(GAINS, experts, recovered, examples, strict=True):
        own, its = (
            log_softmax(gain * x.astype(np.float64) @ model["w/kernel"].astype(np.float64))
            for model in (expert, other)
        )
        found.append(np.mean(np.sum(np.exp(own) * (own - its), axis=-1)))
    return np.array(found)


def recovered(state):
    return [references.flat(RETEX.recover(state, task)) for task in range(NUM_TASKS)]


def test_weights_are_those_of_the_definition():
    """On a solver of our own, whose errors fall with a task's weight."""
    pretrained, experts = linear_experts()
    examples, rng = inputs(), np.random.default_rng(2)
    noise = [0.05 * rng.normal(size=(WIDTH, WIDTH)) for _ in range(NUM_TASKS)]

    def recover(weights, task):
        return {"w/kernel": (experts[task]["w/kernel"] + noise[task] / weights[task]).astype("f4")}

    rounds = []

    def solve(weights, number):
        rounds.append((number, weights))
        return lambda task: references.nested(recover(weights, task))

    first = np.array([1.2, 0.9, np.sqrt(3 - 1.2**2 - 0.9**2)])
    found = weighting.by_divergence(
        expert_set(pretrained, experts), calibration(examples), first, solve
    )

    weights, sums = first, []
    for number, tried in rounds:
        assert number == len(sums)
        np.testing.assert_allclose(tried, weights, rtol=1e-4)
        models = [recover(weights, task) for task in range(NUM_TASKS)]
        lost = losses(experts, models, examples)
        errors = [
            np.sum((model["w/kernel"].astype(np.float64) - expert["w/kernel"]) ** 2)
            for model, expert in zip(models, experts, strict=True)
        ]
        sums.append(lost.sum())
        aim = np.sqrt(np.maximum(lost, 0.01 * lost.mean()) / errors)
        aim /= np.sqrt(np.mean(aim**2))
        weights = np.exp(0.6 * np.log(weights) + 0.4 * np.log(aim))
        weights /= np.sqrt(np.mean(weights**2))
    assert len(sums) == weighting.ROUNDS
    assert sums[1] < sums[0]
    np.testing.assert_array_equal(found, rounds[int(np.argmin(sums))][1])


def test_predictions_lose_less_than_by_energy():
    pretrained, experts = linear_experts()
    made, examples = expert_set(pretrained, experts), inputs()
    told = []
    state = RETEX.fit(
        made, **BUDGET, task_weights="divergence", calibration=calibration(examples),
        progress=lambda *done: told.append(done),
    )  # fmt: skip
    by_energy = RETEX.fit(made, **BUDGET, task_weights="energy")
    lost = losses(experts, recovered(state), examples)
    before = losses(experts, recovered(by_energy), examples)
    assert lost.sum() < 0.9 * before.sum()
    assert lost.argmax() == before.argmax() == 2
    parts = [done / total for done, total in told]
    assert parts == sorted(parts)
    assert parts[-1] == 1


def test_it_is_the_fit_with_the_weights_that_it_finds(monkeypatch):
    made, given = expert_set(*linear_experts()), calibration(inputs())
    real, found = weighting.by_divergence, []
    monkeypatch.setattr(
        weighting, "by_divergence", lambda *args: found.append(real(*args)) or found[0]
    )
    for options in (BUDGET, {"rank": 3}):
        found.clear()
        state = RETEX.fit(made, **options, task_weights="divergence", calibration=given)
        assert np.mean(found[0] ** 2) == pytest.approx(1, rel=1e-12)
        same = RETEX.fit(made, **options, task_weights=found[0].tolist())
        assert jax.tree.structure(state) == jax.tree.structure(same)
        for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("orientation", ["right", "auto"])
def test_with_errors_that_are_weighed_by_inputs(orientation):
    made, examples = expert_set(*linear_experts()), inputs()
    plain = calibration(examples)
    given = replace(plain, linear_inputs=lambda params, batch: {"w/kernel": batch["x"]})
    options = {**BUDGET, "orientation": orientation, "shrinkage": 0.3, "calibration": given}
    experts = [references.flat(made.expert_params(task)) for task in range(NUM_TASKS)]
    lost, before = (
        losses(experts, recovered(RETEX.fit(made, **options, task_weights=rule)), examples)
        for rule in ("divergence", "energy")
    )
    assert lost.sum() < before.sum()


def test_what_is_recovered_exactly_keeps_its_weight():
    weights = np.sqrt([1.5, 1.0, 0.5])
    found = weighting.updated(weights, np.array([0.0, 0.4, 0.1]), np.array([0.0, 1.0, 1.0]))
    assert np.mean(found**2) == pytest.approx(1)
    assert found[1] / found[2] > weights[1] / weights[2]
    np.testing.assert_array_equal(weighting.updated(weights, np.zeros(3), np.ones(3)), weights)


def test_regressions_lose_their_squared_errors():
    """A head of one output has no probabilities: their logarithms are 0 whatever it says."""
    rng = np.random.default_rng(3)
    pretrained = {"w/kernel": rng.normal(size=(WIDTH, 6)).astype("f4")}
    experts = [
        {"w/kernel": (pretrained["w/kernel"] + 0.3 * rng.normal(size=(WIDTH, 6))).astype("f4")}
        for _ in range(2)
    ]

    def logits(params, head, batch):
        return batch["x"] @ params["w"]["kernel"] @ head

    given = replace(
        calibration(inputs()[:2]), logits=logits, heads=[20 * np.eye(6, 1, dtype="f4"), np.eye(6)]
    )
    solved = []

    def solve(weights, number):
        solved.append(weights)
        return lambda task: {"w": {"kernel": experts[task]["w/kernel"] + 0.1}}

    weighting.by_divergence(expert_set(pretrained, experts), given, np.ones(2), solve)
    assert solved[1][0] > 1 > solved[1][1]
    assert weighting.divergence(np.array([[1.0], [2.0]]), np.array([[3.0], [2.0]])) == 1.0


def test_one_expert():
    pretrained, experts = linear_experts()
    given = calibration(inputs()[:1])
    state = RETEX.fit(
        expert_set(pretrained, experts[:1]), rank=2, task_weights="divergence", calibration=given
    )
    found = references.flat(RETEX.recover(state, 0))
    np.testing.assert_allclose(found["w/kernel"], experts[0]["w/kernel"], atol=1e-5)


def test_inputs_are_needed_before_any_work(monkeypatch):
    made = expert_set(*linear_experts())
    monkeypatch.setattr(bases, "merge", None)
    with pytest.raises(ValueError, match="calibration: got None, but retex with task_weights"):
        RETEX.fit(made, rank=2, task_weights="divergence")
    both = "task_weights = 'divergence' and retex with a shrinkage below 1 needs inputs"
    with pytest.raises(ValueError, match=both):
        RETEX.fit(made, rank=2, task_weights="divergence", shrinkage=0.5)
    with pytest.raises(ValueError, match=r"calibration\.batches: got 2, expected"):
        RETEX.fit(made, rank=2, task_weights="divergence", calibration=calibration(inputs()[:2]))


def test_predictions_that_are_not_finite():
    pretrained, experts = linear_experts()
    examples = inputs()
    examples[1][3, 2] = np.nan
    made = expert_set(pretrained, experts, names=["one", "two", "three"])
    with pytest.raises(ValueError, match=r"NaN or Inf for the experts of \['two'\]"):
        RETEX.fit(made, rank=2, task_weights="divergence", calibration=calibration(examples))


def test_data_are_needed_by_divergence_only():
    assert RETEX.needs_with({"task_weights": "energy"}) == "none"
    assert RETEX.needs_with({"task_weights": (1.0, 2.0)}) == "none"
    assert RETEX.needs_with({"task_weights": "divergence"}) == "calibration inputs"


def test_errors_count_by_their_leaf_and_integers_not_at_all():
    expert = {"a": np.array([3, 4]), "v": np.ones(2, "f4"), "w": np.array([1, 2], "f4")}
    other = {"a": np.array([0, 0]), "v": np.zeros(2, "f4"), "w": np.array([1, 4], "f4")}
    assert not tree.is_float(expert["a"].dtype)
    assert weighting.squared_error(expert, other, {"w": 0.5}) == 2 + 0.25 * 4


# Leaves by how far the predictions depend on them

SCALES = {"first/kernel": 1.0, "second/kernel": 0.1, "unread/kernel": 0.0}


def experts_of_leaves():
    """Three experts of three kernels, whose offsets are as large as each other."""
    rng = np.random.default_rng(0)
    pretrained = {name: rng.normal(size=(WIDTH, WIDTH)).astype("f4") for name in SCALES}
    return pretrained, [
        {
            name: (leaf + 0.3 * rng.normal(size=leaf.shape)).astype("f4")
            for name, leaf in pretrained.items()
        }
        for _ in range(NUM_TASKS)
    ]


def sum_of_layers(examples, size=8):
    """A model that reads the kernels to different extents."""

    def logits(params, head, batch):
        flat = tree.flatten(params)
        return sum(scale * (batch["x"] @ flat[name]) for name, scale in SCALES.items())

    batches = [[{"x": x[i : i + size]} for i in range(0, len(x), size)] for x in examples]
    return Calibration(
        batches, lambda params, batch: batch["x"], logits, heads=[None] * len(examples)
    )


def mean_fisher(expert, examples, size=8):
    """Of each kernel: the mean of its entries of the diagonal, with a batch's gradients summed before the square."""
    sums = dict.fromkeys(SCALES, 0.0)
    for i in range(0, len(examples), size):
        x = examples[i : i + size].astype(np.float64)
        logits = sum(scale * x @ expert[name].astype(np.float64) for name, scale in SCALES.items())
        roots = np.exp(log_softmax(logits) / 2)
        # d/dz of sum_c sqrt(p_c) log p_c, with sqrt(p_c) held fixed.
        inner = roots - roots.sum(axis=1, keepdims=True) * roots**2
        for name, scale in SCALES.items():
            sums[name] += np.mean((scale * x.T @ inner) ** 2) / len(examples)
    return sums


def test_leaves_count_by_the_root_of_their_mean_fisher_information():
    pretrained, experts = experts_of_leaves()
    examples = inputs()
    made, given = expert_set(pretrained, experts), sum_of_layers(examples)
    found = weighting.by_fisher(made, given, list(SCALES))
    used = [x[: weighting.NUM_INPUTS] for x in examples]
    assert len(used[0]) < len(examples[0])
    relative = []
    for expert, x in zip(experts, used, strict=True):
        means = mean_fisher(expert, x)
        relative.append([means[name] / np.mean(list(means.values())) for name in SCALES])
    want = np.sqrt(np.mean(relative, axis=0))
    for name, squared in zip(SCALES, want, strict=True):
        assert found[name] ** 2 == pytest.approx(squared, rel=1e-4)
    assert found["unread/kernel"] == 0


def test_bytes_go_where_predictions_depend_on_them():
    made, examples = expert_set(*experts_of_leaves()), inputs()
    states = {
        rule: RETEX.fit(
            made, budget=0.1, bits=3, leaf_weights=rule, calibration=sum_of_layers(examples)
        )
        for rule in ("equal", "fisher")
    }
    sizes = {rule: offsets.offset_bytes(state) for rule, state in states.items()}
    assert sizes["fisher"] == pytest.approx(sizes["equal"], rel=0.2)
    assert "unread/kernel" in states["equal"].offsets
    assert "unread/kernel" not in states["fisher"].offsets
    errors = {
        rule: sum(
            np.sum((found["first/kernel"] - expert["first/kernel"]) ** 2)
            for found, expert in zip(recovered(state), experts_of_leaves()[1], strict=True)
        )
        for rule, state in states.items()
    }
    assert errors["fisher"] < 0.7 * errors["equal"]


def test_both_weights_together(monkeypatch):
    """Errors of tasks count with the leaves' weights, as the solver has them."""
    given, real = [], weighting.by_divergence

    def spied(experts, calibration, first, solve, leaf_weights):
        given.append(leaf_weights)
        return real(experts, calibration, first, solve, leaf_weights)

    monkeypatch.setattr(weighting, "by_divergence", spied)
    made, inputs_ = expert_set(*experts_of_leaves()), sum_of_layers(inputs())
    RETEX.fit(made, **BUDGET, task_weights="divergence", leaf_weights="fisher", calibration=inputs_)
    assert given == [weighting.by_fisher(made, inputs_, list(made.float_leaves))]


def test_a_killed_fit_keeps_its_weights(tmp_path, monkeypatch):
    made = expert_set(*experts_of_leaves())
    options = {
        **BUDGET, "task_weights": "divergence", "leaf_weights": "fisher",
        "calibration": sum_of_layers(inputs()),
    }  # fmt: skip
    whole = RETEX.fit(made, **options)
    path = tmp_path / "offsets.safetensors"

    def stop(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RETEX.fit(made, **options, file=path, resume="these", progress=stop)
    for name in ("by_divergence", "by_fisher"):
        monkeypatch.setattr(weighting, name, lambda *_: pytest.fail("sought again"))
    resumed = RETEX.fit(made, **options, file=path, resume="these")
    for mine, theirs in zip(recovered(whole), recovered(resumed), strict=True):
        for name in SCALES:
            np.testing.assert_array_equal(mine[name], theirs[name])


def test_predictions_that_depend_on_nothing():
    made = expert_set(*experts_of_leaves())
    given = sum_of_layers([np.zeros_like(x) for x in inputs()])
    assert weighting.by_fisher(made, given, list(SCALES)) == dict.fromkeys(SCALES, 1.0)


def test_fisher_information_that_is_not_finite():
    examples = inputs()
    examples[1][3, 2] = np.nan
    names = {"names": ["one", "two", "three"]}
    made = expert_set(*experts_of_leaves(), **names)
    with pytest.raises(ValueError, match="two: its Fisher information has"):
        RETEX.fit(made, budget=0.2, leaf_weights="fisher", calibration=sum_of_layers(examples))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, "leaf_weights: got 'fisher' without a budget"),
        ({"budget": 0.2}, "calibration: got None, but retex with leaf_weights = 'fisher' needs"),
        ({"budget": 0.2, "leaf_weights": "size"}, "leaf_weights: got 'size', expected one of"),
    ],
)
def test_leaf_weights_that_cannot_be(options, message, monkeypatch):
    monkeypatch.setattr(bases, "merge", None)
    with pytest.raises(ValueError, match=message):
        RETEX.fit(expert_set(*experts_of_leaves()), **{"leaf_weights": "fisher", **options})
    assert RETEX.needs_with({"leaf_weights": "fisher"}) == "calibration inputs"
