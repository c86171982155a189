"""Activation-aware fits against their definition: errors of outputs on inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import references_activations as want
from expert_sets import expert_set

import retex_jax as rtx
from retex_jax import tree, variants
from retex_jax.calibration import Calibration
from retex_jax.offsets import activations, bases

RETEX = rtx.METHODS["retex"]


def calibration(examples, widths, size=20, scale=None):
    """Layers read the first entries of an input; with `scale`, tanh of the leaf of that name times these."""

    def linear_inputs(params, batch):
        x = batch["x"]
        if scale is not None:
            x = jnp.tanh(params[scale].astype(jnp.float32) * x)
        return {name: x[:, :width] for name, width in widths.items()} | {"head/kernel": x}

    return Calibration(
        batches=[[{"x": x[i : i + size]} for i in range(0, len(x), size)] for x in examples],
        features=lambda params, batch: batch["x"],
        logits=lambda params, head, batch: batch["x"],
        heads=[None] * len(examples),
        linear_inputs=linear_inputs,
    )


def models(layout, num_tasks):
    pretrained, experts = references.flax_model(num_tasks)
    if layout == "flax":
        return pretrained, experts, want.WIDTHS
    return (
        references.as_torch(pretrained),
        [references.as_torch(expert) for expert in experts],
        want.TORCH_WIDTHS,
    )


def recovered(state, num_tasks):
    return [references.flat(RETEX.recover(state, task)) for task in range(num_tasks)]


def normalized(weights, num_tasks):
    weights = np.ones(num_tasks) if weights is None else np.asarray(weights, np.float64)
    return weights / np.sqrt(np.mean(weights**2))


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("orientation", ["right", "left"])
@pytest.mark.parametrize(
    ("layout", "num_tasks", "weights", "shrinkage"),
    [
        ("flax", 1, None, 0.3),
        ("flax", 2, [1.0, 3.0], 0.01),
        ("flax", 8, None, 0.5),
        ("torch", 2, [1.0, 3.0], 0.01),
    ],
)
def test_it_is_the_optimum_of_the_outputs(layout, orientation, num_tasks, weights, shrinkage):
    pretrained, experts, widths = models(layout, num_tasks)
    examples = want.inputs(num_tasks)
    state = RETEX.fit(
        expert_set(pretrained, experts, layout=layout), rank=3, orientation=orientation,
        calibration=calibration(examples, widths, scale="scale"), shrinkage=shrinkage,
        task_weights="equal" if weights is None else weights,
    )  # fmt: skip
    scales = normalized(weights, num_tasks)
    base = references.flat(state.merged)
    for name, width in widths.items():
        reads = [np.tanh(float(base["scale"]) * x.astype(np.float64))[:, :width] for x in examples]
        rows = want.samples(reads, shrinkage)
        offsets, left = want.errors_of(base, experts, recovered(state, num_tasks), name)
        energy = want.error(offsets, rows, scales)
        error = want.error(left, rows, scales)
        best = want.optimum(offsets, rows, scales, 3, orientation)
        assert state.report.energies[name] == pytest.approx(energy, rel=1e-4)
        # What is recovered is rounded to float32 after it is added to the merged model.
        assert error == pytest.approx(best, rel=1e-4, abs=1e-9 * energy)
        assert state.report.residuals[name] == pytest.approx(best, rel=1e-4, abs=1e-9 * energy)
        assert state.report.optima[name] == pytest.approx(best, rel=1e-4, abs=1e-9 * energy)


def test_least_squares_in_turn_end_there():
    pretrained, experts = references.few_leaves(3)
    examples, widths = want.inputs(3), {"dense/kernel": 12}
    state = RETEX.fit(
        expert_set(pretrained, experts), rank=4, shrinkage=0.05,
        calibration=calibration(examples, widths),
    )  # fmt: skip
    rows = want.samples([x[:, :12] for x in examples], 0.05)
    base = references.flat(state.merged)
    offsets, left = want.errors_of(base, experts, recovered(state, 3), "dense/kernel")
    found, error = want.alternating(offsets, rows, 4)
    np.testing.assert_allclose(offsets - left, found, atol=1e-4)
    assert state.report.residuals["dense/kernel"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"rank": 2, "orientation": "left", "bits": 4, "vector_bits": 8},
        {"budget": 0.4, "sharing": "auto", "orientation": "auto", "bits": 3, "vector_bits": 4},
        {"budget": 0.6, "sharing": "separate", "task_weights": "energy"},
    ],
)
def test_without_shrinkage_below_1_nothing_changes(options):
    pretrained, experts = references.few_leaves(2)
    made = expert_set(pretrained, experts)
    given = calibration(want.inputs(2), want.WIDTHS)
    same(RETEX.fit(made, **options), RETEX.fit(made, calibration=given, shrinkage=1.0, **options))


@pytest.mark.parametrize("orientation", ["right", "left"])
def test_leaves_that_read_no_inputs_stay_as_they_are(orientation):
    pretrained, experts = references.flax_model(2)
    made, options = expert_set(pretrained, experts), {"rank": 3, "orientation": orientation}
    given = calibration(want.inputs(2), {"dense/kernel": 12})
    state = RETEX.fit(made, calibration=given, shrinkage=0.1, **options)
    plain = RETEX.fit(made, **options)
    differ = []
    for name, form in plain.offsets.items():
        pairs = zip(jax.tree.leaves(form), jax.tree.leaves(state.offsets[name]), strict=True)
        if not all(np.array_equal(one, two) for one, two in pairs):
            differ.append(name)
    assert differ == ["dense/kernel"]


def test_inputs_that_are_all_zero_are_plain():
    pretrained, experts = references.flax_model(2)
    made = expert_set(pretrained, experts)
    given = calibration([np.zeros((8, 16), "f4")] * 2, want.WIDTHS)
    same(RETEX.fit(made, rank=3), RETEX.fit(made, rank=3, calibration=given, shrinkage=0.1))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"rank": 3, "orientation": "left"},
        {"budget": 0.5, "sharing": "separate"},
        {"budget": 0.5, "sharing": "shared", "orientation": "auto"},
    ],
)
@pytest.mark.parametrize("count", [3, 40])
def test_no_solution_is_better_than_the_plain_one_in_the_metric(options, count):
    """With 3 inputs a task C is singular. With a budget the ranks differ, so the whole model is compared."""
    pretrained, experts = references.flax_model(2)
    made, examples = expert_set(pretrained, experts), want.inputs(2, count)
    given = calibration(examples, want.WIDTHS)
    states = {s: RETEX.fit(made, calibration=given, shrinkage=s, **options) for s in (1.0, 0.02)}
    errors = {s: metric_errors(state, experts, examples, 0.02) for s, state in states.items()}
    assert np.isfinite(list(errors[0.02].values())).all()
    if "rank" in options:
        for name in want.WIDTHS:
            assert errors[0.02][name] <= errors[1.0][name] * (1 + 1e-5), name
        assert errors[0.02]["dense/kernel"] < 0.9 * errors[1.0]["dense/kernel"]
    assert sum(errors[0.02].values()) < sum(errors[1.0].values())


def metric_errors(state, experts, examples, shrinkage, weights=None):
    """By float leaf; a leaf that reads no inputs has the identity for a metric."""
    num_tasks = len(experts)
    base, models = references.flat(state.merged), recovered(state, num_tasks)
    scales, errors = normalized(weights, num_tasks), {}
    for name in state.report.residuals:
        if name in want.WIDTHS:
            rows = want.samples([x[:, : want.WIDTHS[name]] for x in examples], shrinkage)
            left = want.errors_of(base, experts, models, name)[1]
            errors[name] = want.error(left, rows, scales)
        else:
            errors[name] = sum(
                scales[task] ** 2
                * np.sum((models[task][name].astype(np.float64) - experts[task][name]) ** 2)
                for task in range(num_tasks)
            )
    return errors


@pytest.mark.parametrize("orientation", ["right", "left", "auto"])
@pytest.mark.parametrize("sharing", [None, "shared", "separate", "auto"])
@pytest.mark.parametrize("bits", [3, pytest.param(8, marks=pytest.mark.slow), 32])
def test_the_report_is_that_of_what_is_stored(orientation, sharing, bits):
    # Coding is compiled for every shape; the shapes themselves are tried without it.
    model = references.flax_model if bits == 32 else references.few_leaves
    pretrained, experts = model(2)
    examples, widths = want.inputs(2), {n: w for n, w in want.WIDTHS.items() if n in pretrained}
    size = {"rank": 3} if sharing is None else {"budget": 0.5, "sharing": sharing}
    weights = [1.0, 2.0]
    state = RETEX.fit(
        expert_set(pretrained, experts), calibration=calibration(examples, widths),
        shrinkage=0.1, orientation=orientation, bits=bits, task_weights=weights, **size,
    )  # fmt: skip
    if sharing is not None:
        assert RETEX.extra_bytes(state) <= 0.5 * 2 * tree.param_bytes(state.merged)
    errors = metric_errors(state, experts, examples, 0.1, weights)
    for name, error in errors.items():
        energy = state.report.energies[name]
        assert state.report.residuals[name] == pytest.approx(error, rel=1e-3, abs=1e-9 * energy)
        least = state.report.optima[name]
        assert least <= state.report.residuals[name] * (1 + 1e-4) + 1e-9 * energy


@pytest.mark.parametrize("orientation", ["right", "left"])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_separate_is_the_optimum_of_each_task(shape, orientation):
    outputs, width = shape
    rng = np.random.default_rng(0)
    pretrained = {"w/kernel": np.zeros((width, outputs), "f4")}
    experts = [{"w/kernel": rng.normal(size=(width, outputs)).astype("f4")} for _ in range(3)]
    examples = want.inputs(3)
    state = RETEX.fit(
        expert_set(pretrained, experts), budget=0.5, sharing="separate", orientation=orientation,
        calibration=calibration(examples, {"w/kernel": width}), shrinkage=0.1,
        base=references.nested(pretrained),
    )  # fmt: skip
    form = state.offsets["w/kernel"]
    assert sum(form.ranks) > 3
    rows = want.samples([x[:, :width] for x in examples], 0.1)
    for task, rank in enumerate(form.ranks):
        offset = experts[task]["w/kernel"].T[None].astype(np.float64)
        found = references.flat(RETEX.recover(state, task))["w/kernel"].T
        best = want.optimum(offset, rows, np.ones(1), rank, "left")
        energy = want.error(offset, rows, np.ones(1))
        error = want.error(offset - found, rows, np.ones(1))
        assert error == pytest.approx(best, rel=1e-4, abs=1e-9 * energy)


def test_a_refit_makes_up_for_coding_where_inputs_are():
    # The other factor of a coded one is that of the metric: no other task factors have a smaller error.
    rng = np.random.default_rng(0)
    pretrained = {"w/kernel": np.zeros((12, 10), "f4")}
    experts = [{"w/kernel": rng.normal(size=(12, 10)).astype("f4")} for _ in range(2)]
    examples = want.inputs(2)
    state = RETEX.fit(
        expert_set(pretrained, experts), rank=4, bits=16, shrinkage=0.05,
        calibration=calibration(examples, {"w/kernel": 12}), base=references.nested(pretrained),
    )  # fmt: skip
    rows = want.samples([x[:, :12] for x in examples], 0.05)
    offsets = np.stack([expert["w/kernel"].T for expert in experts]).astype(np.float64)
    shared = np.asarray(state.factors("w/kernel", 0)[1], np.float64)
    second = rows.T @ rows
    solved = offsets @ second @ shared.T @ np.linalg.inv(shared @ second @ shared.T)
    least = want.error(offsets - solved @ shared, rows, np.ones(2))
    assert state.report.residual == pytest.approx(least, rel=1e-3)


def test_a_budget_goes_where_inputs_are():
    rng = np.random.default_rng(0)
    pretrained = {f"{name}/kernel": np.zeros((12, 10), "f4") for name in ("met", "missed")}
    experts = []
    for _ in range(2):
        made = {}
        for name, part in (("met", slice(0, 6)), ("missed", slice(6, 12))):
            made[f"{name}/kernel"] = np.zeros((12, 10), "f4")
            made[f"{name}/kernel"][part] = rng.normal(size=(6, 10))
        experts.append(made)
    examples = [rng.normal(size=(40, 12)).astype("f4") * (np.arange(12) < 6) for _ in range(2)]
    given = calibration(examples, dict.fromkeys(pretrained, 12))
    options = {"budget": 0.5, "base": references.nested(pretrained), "calibration": given}
    ranks = {}
    for shrinkage in (1.0, 0.01):
        state = RETEX.fit(expert_set(pretrained, experts), shrinkage=shrinkage, **options)
        ranks[shrinkage] = {name: form.shared.shape[0] for name, form in state.offsets.items()}
    assert ranks[1.0].keys() == pretrained.keys()
    assert ranks[0.01].get("met/kernel", 0) == 6
    assert ranks[0.01].get("missed/kernel", 0) < ranks[1.0]["missed/kernel"]


def test_the_root_by_hand():
    # The mean eigenvalue of diag(1, 4) is 2.5: half of diag(.4, 1.6) and half of the identity is diag(.7, 1.3).
    found = activations.root(np.diag([1.0, 4.0]), 0.5)
    np.testing.assert_allclose(found, np.diag(np.sqrt([0.7, 1.3])), rtol=1e-6)
    # Of [[2, 1], [1, 2]], in units of 2, at s = .2: [[1, .4], [.4, 1]] = L L^T.
    found = activations.root(np.array([[2.0, 1.0], [1.0, 2.0]]), 0.2)
    np.testing.assert_allclose(found, [[1, 0], [0.4, np.sqrt(0.84)]], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrinkage": 0}, "shrinkage: got 0, expected a number above 0, at most 1"),
        ({"shrinkage": 1.5}, "shrinkage: got 1.5"),
        ({"shrinkage": float("nan")}, "shrinkage: got nan"),
        ({"shrinkage": 0.5, "calibration": None}, "calibration: got None, but retex with a shrink"),
        ({"shrinkage": 0.5, "solver": "adam"}, "shrinkage: got 0.5, which solver 'exact' takes"),
        ({"shrinkage": 0.5, "form": "affine"}, "shrinkage: got 0.5, which solver 'exact' takes"),
        ({"shrinkage": 0.5, "d_emb": 1}, "shrinkage: got 0.5, which solver 'exact' takes"),
        ({"shrinkage": 0.5, "roots": {}}, "roots: no such option"),
    ],
)
def test_bad_options(options, message):
    pretrained, experts = references.few_leaves(2)
    given = {"calibration": calibration(want.inputs(2), {"dense/kernel": 12}), **options}
    with pytest.raises(ValueError, match=message):
        RETEX.fit(expert_set(pretrained, experts), rank=2, **given)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"dense/kernel": 11}, r"dense/kernel of shape \(12, 10\) has inputs of shape \(20, 11\)"),
        ({"dens/kernel": 12}, r"got \['dens/kernel', 'head/kernel'\], none of which is a matrix"),
        (None, "calibration.linear_inputs: got None, but retex with a shrinkage below 1 needs"),
    ],
)
def test_inputs_that_do_not_fit(widths, message, monkeypatch):
    pretrained, experts = references.few_leaves(2)
    given = calibration(want.inputs(2), widths or {})
    if widths is None:
        given = Calibration(given.batches, given.features, given.logits, given.heads)
        monkeypatch.setattr(bases, "merge", None)  # this is told before any work
    with pytest.raises(ValueError, match=message):
        RETEX.fit(expert_set(pretrained, experts), rank=2, shrinkage=0.5, calibration=given)


def test_inputs_that_are_not_finite():
    pretrained, experts = references.few_leaves(2)
    examples = want.inputs(2)
    examples[1][3, 2] = np.nan
    given = calibration(examples, {"dense/kernel": 12})
    with pytest.raises(ValueError, match="the merged model: the inputs of dense/kernel have"):
        RETEX.fit(expert_set(pretrained, experts), rank=2, shrinkage=0.5, calibration=given)


def test_data_are_needed_below_1_only():
    assert RETEX.needs_with({}) == RETEX.needs_with({"shrinkage": 1.0}) == RETEX.needs == "none"
    assert RETEX.needs_with({"shrinkage": 0.1}) == "calibration inputs"
    assert rtx.METHODS["regmean"].needs_with({"alpha": 1.0}) == "calibration inputs"
    grid = {"shrinkage": (1.0, 0.1)}
    for entry, needs in (
        (variants.Entry("retex", {"rank": 2}), "none"),
        (variants.Entry("retex", {"rank": 2, "shrinkage": 0.1}), "calibration inputs"),
        (
            variants.Entry("retex", {"rank": 2}, grid=grid),
            "calibration inputs; labelled validation inputs",
        ),
        (variants.Entry("ties", grid={"scaling": (1.0,)}), "labelled validation inputs"),
    ):
        assert entry.needs == needs
