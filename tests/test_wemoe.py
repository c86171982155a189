from dataclasses import replace

import jax
import numpy as np
import pytest
import references
import references_routed as ref
import routed_model as net

from retex_jax import models
from retex_jax.calibration import Calibration
from retex_jax.personalized import gate_training, gating, wemoe


def _fit(case, names=None, **options):
    options = {"calibration": case[4], "steps": 0, **options}
    return wemoe.fit(net.experts(case[0], case[1], names), **options)


def _base(case, scaling=0.3):
    """Task Arithmetic, but theta_0 at the MLPs."""
    merged = ref.task_arithmetic(case[0], case[1], scaling)
    return {name: case[0][name] if "/mlp/" in name else leaf for name, leaf in merged.items()}


def _vectors(case):
    return ref.differences(case[0], case[1])


def _gates(case, seed=0):
    """Gates that depend on the input."""
    rng = np.random.default_rng(seed)
    count = len(case[1])
    shapes = {
        "hidden_kernel": (ref.WIDTH, ref.WIDTH),
        "hidden_bias": (ref.WIDTH,),
        "kernel": (ref.WIDTH, count),
        "bias": (count,),
    }
    return {
        path: {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
        for path in ref.MLPS
    }


def _with_gates(state, gates):
    return wemoe.WemoeState(state.base, state.experts, gates, state.mask)


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
def test_mixtures(num_tasks):
    case = net.case(num_tasks)
    state = _fit(case, scaling=0.2)
    base, vectors = _base(case, 0.2), _vectors(case)
    for weights in (np.linspace(-0.5, 1, num_tasks), np.eye(num_tasks)[0]):
        mixed = ref.mixture(case[0], vectors, weights)
        want = {n: mixed[n] if "/mlp/" in n else np.float64(base[n]) for n in mixed}
        net.assert_model(wemoe.mix(state, weights), want)
    net.assert_model(wemoe.recover(state, 0), want)
    # With 0.3 and 0.3, Task Arithmetic.
    uniform = wemoe.mix(_fit(case), np.full(num_tasks, 0.3))
    net.assert_model(uniform, ref.task_arithmetic(case[0], case[1], 0.3))


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_prediction_gates_every_input_alone(num_tasks):
    case = net.case(num_tasks)
    gates = _gates(case)
    state = _with_gates(_fit(case), gates)
    batch, _ = net.mixed_batch(case[2])
    want, values = ref.wemoe_features(_base(case), _vectors(case), gates, batch["x"])
    for chunk in (1, 5, 100):
        found = wemoe.predict(state, case[4], batch, chunk=chunk)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    weights = wemoe.weights(state, case[4], batch)
    assert set(weights) == set(ref.MLPS)
    for path in ref.MLPS:
        assert np.ptp(values[path], axis=0).min() > 1e-2  # the gates do depend on the input
        np.testing.assert_allclose(weights[path], values[path], rtol=1e-4, atol=1e-5)


def test_padding_has_no_part_in_the_gates():
    case = net.case(2)
    gates = _gates(case)
    state = _with_gates(_fit(case), gates)
    x = case[2][0]
    mask = np.ones(x.shape[:2], np.int32)
    mask[:, 2] = 0
    mask[0, 1] = 0
    want, _ = ref.wemoe_features(_base(case), _vectors(case), gates, x, mask)
    found = wemoe.predict(state, case[4], {"x": x, "attention_mask": mask})
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    short = {"x": x[1:, :2], "attention_mask": mask[1:, :2]}
    np.testing.assert_allclose(wemoe.predict(state, case[4], short), want[1:], rtol=1e-4, atol=1e-5)


def test_gates_start_as_defined():
    case = net.case(3)
    gates = _fit(case, init_gate=0.4).gates
    assert set(gates) == set(ref.MLPS)
    values = [np.ravel(gates[path][n]) for path in gates for n in ("hidden_kernel", "kernel")]
    values = np.concatenate(values)
    assert len(np.unique(values)) == len(values) == 2 * (16 + 12)
    assert 0.007 < values.std() < 0.013 and abs(values.mean()) < 0.005
    for path in gates:
        np.testing.assert_array_equal(gates[path]["hidden_bias"], 0)
        np.testing.assert_array_equal(gates[path]["bias"], np.float32(0.4))


def _entropy(case, gates, task, batch_gate):
    outputs, _ = ref.wemoe_features(
        _base(case), _vectors(case), gates, case[2][task], batch_gate=batch_gate
    )
    return ref.entropy(outputs @ np.float64(case[3][task])).mean()


@pytest.mark.parametrize("batch_gate", [True, False])
def test_entropy_and_its_gradient(batch_gate):
    case = net.case(2)
    state = _fit(case)
    gates = _gates(case, 3)
    loss, gradients = gate_training.entropy_and_gradient(
        gates,
        state.base,
        state.experts,
        case[3][1],
        {"x": case[2][1]},
        logits=case[4].logits,
        batch_gate=batch_gate,
        mask=None,
    )
    np.testing.assert_allclose(loss, _entropy(case, gates, 1, batch_gate), rtol=1e-5)
    for path in ref.MLPS:
        for name, leaf in gates[path].items():
            index = (0,) * leaf.ndim
            ends = []
            for step in (1e-5, -1e-5):
                moved = {p: dict(g) for p, g in gates.items()}
                moved[path][name] = leaf.astype(np.float64)
                moved[path][name][index] += step
                ends.append(_entropy(case, moved, 1, batch_gate))
            want = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose(gradients[path][name][index], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch_gate", "cosine"), [(True, False), (False, True)])
def test_adaptation_lowers_the_entropies(batch_gate, cosine):
    case = net.case(2)
    calls = []
    options = {"learning_rate": 1e-2, "batch_gate": batch_gate, "cosine": cosine}
    state = _fit(case, steps=12, progress=lambda *done: calls.append(done), **options)
    assert calls == [(step, 12) for step in range(1, 13)]
    before, after = (
        sum(_entropy(case, jax.device_get(gates), task, batch_gate) for task in range(2))
        for gates in (_fit(case).gates, state.gates)
    )
    assert after < before - 1e-3
    again = _fit(case, steps=12, **options)
    jax.tree.map(np.testing.assert_array_equal, state.gates, again.gates)


def test_the_first_step_of_adam_follows_the_sum_of_all_tasks():
    case = net.case(2)
    start, after = (_fit(case, steps=steps, learning_rate=1e-3).gates for steps in (0, 1))
    total = None
    for task in range(2):
        _, gradients = gate_training.entropy_and_gradient(
            start,
            _fit(case).base,
            _fit(case).experts,
            case[3][task],
            {"x": case[2][task][:4]},
            logits=case[4].logits,
            batch_gate=True,
            mask="attention_mask",
        )
        total = gradients if total is None else jax.tree.map(np.add, total, gradients)
    for path in ref.MLPS:
        gradient = np.float64(total[path]["bias"])
        want = np.float64(start[path]["bias"]) - 1e-3 * gradient / (np.abs(gradient) + 1e-8)
        np.testing.assert_allclose(after[path]["bias"], want, rtol=1e-5)


def test_no_true_task_or_label_decides():
    case = net.case(3)
    state = _with_gates(_fit(case), _gates(case))
    batch, tasks = net.mixed_batch(case[2])
    want = np.asarray(wemoe.predict(state, case[4], batch))
    for label in (tasks, tasks[::-1]):
        labelled = batch | {"label": label.astype(np.int32)}
        np.testing.assert_array_equal(wemoe.predict(state, case[4], labelled), want)
    order = np.random.default_rng(1).permutation(len(tasks))
    shuffled = wemoe.predict(state, case[4], {"x": batch["x"][order]})
    np.testing.assert_allclose(shuffled, want[order], rtol=1e-5, atol=1e-6)


def test_order_of_tasks_does_not_matter():
    pretrained, experts, xs, heads, _ = net.case(3)
    order = [2, 0, 1]
    other = net.calibration([xs[t] for t in order], [heads[t] for t in order])
    first = _fit(net.case(3), "abc", steps=3)
    second = _fit((pretrained, [experts[t] for t in order], None, None, other), "cab", steps=3)
    for path in ref.MLPS:
        for name, axes in (("kernel", 1), ("bias", 0)):
            want = np.take(np.asarray(first.gates[path][name]), order, axis=axes)
            np.testing.assert_allclose(second.gates[path][name], want, rtol=1e-4, atol=1e-5)


def test_the_key_decides_the_start():
    case = net.case(2)
    first, again, other = (_fit(case, key=jax.random.key(seed)).gates for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    path = ref.MLPS[0]
    assert np.all(np.asarray(first[path]["kernel"]) != np.asarray(other[path]["kernel"]))


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_models_of_the_package(kind):
    rng = np.random.default_rng(0)
    if kind == "vit":
        config = models.ViTConfig(
            image_size=8, patch_size=4, width=8, num_layers=2, num_heads=2, mlp_dim=12
        )
        model = models.ViT(config)
        batch = {"image": rng.normal(size=(3, 8, 8, 3)).astype(np.float32)}
    else:
        config = models.BertConfig(
            vocab_size=20, width=8, num_layers=2, num_heads=2, mlp_dim=12, max_length=6
        )
        model = models.Bert(config)
        mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]], np.int32)
        batch = {"input_ids": rng.integers(0, 20, (3, 4)).astype(np.int32), "attention_mask": mask}
    pretrained = jax.device_get(model.init(jax.random.key(0), model.example_batch())["params"])
    experts = [
        jax.tree.map(lambda leaf: leaf + np.float32(0.1 * rng.normal(size=leaf.shape)), pretrained)
        for _ in range(2)
    ]

    @jax.jit
    def features(params, batch):
        return model.apply({"params": params}, batch).pooled

    calibration = Calibration(
        [[batch], [batch]],
        features,
        lambda params, head, batch: features(params, batch)[:, head],
        heads=[np.arange(8), np.arange(1, 8)],
    )
    features(pretrained, batch)  # jit has traced it before
    state = wemoe.fit(
        net.rtx.ExpertSet.from_trees(pretrained, experts), calibration=calibration, steps=0
    )
    assert set(state.gates) == set(ref.MLPS)
    one_hot = {
        path: {
            "hidden_kernel": np.zeros((8, 8), np.float32),
            "hidden_bias": np.zeros(8, np.float32),
            "kernel": np.zeros((8, 2), np.float32),
            "bias": np.float32([0, 1]),
        }
        for path in state.gates
    }
    found = wemoe.predict(_with_gates(state, one_hot), calibration, batch, chunk=2)
    want = features(wemoe.recover(state, 1), batch)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_the_mlps_and_the_gates():
    mlp = ref.WIDTH * ref.HIDDEN * 2 + ref.HIDDEN + ref.WIDTH
    gate = ref.WIDTH * ref.WIDTH + ref.WIDTH + ref.WIDTH * 3 + 3
    assert wemoe.extra_bytes(_fit(net.case(3))) == 4 * 2 * (3 * mlp + gate)


def test_a_model_that_hides_its_modules_is_refused():
    case = net.case(2)
    state = _fit(case)
    with pytest.raises(ValueError, match=r"modules \['blocks_0/mlp', .* were not called"):
        gating.run(
            lambda params, batch: batch["x"],
            state.base,
            state.experts,
            state.gates,
            {"x": case[2][0]},
            None,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": None}, "WEMoE needs inputs of every task"),
        ({"steps": -1, "learning_rate": 0.0}, r"(?s)steps: got -1.*learning_rate: got 0.0"),
        ({"pattern": "ffn$"}, "pattern: got 'ffn"),
        ({"scaling": np.nan}, "scaling: got nan"),
        ({"init_gate": np.inf}, "init_gate: got inf"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(net.case(2), **options)


def test_leaves_left_out_of_the_experts_are_named():
    case = net.case(2)
    trees = [references.nested(model) for model in (case[0], *case[1])]
    experts = net.rtx.ExpertSet.from_trees(trees[0], trees[1:], exclude=["scale", "blocks_1"])
    blind = replace(
        case[4], logits=lambda params, head, batch: net.features(trees[0], batch) @ head
    )
    with pytest.raises(ValueError, match=r"no leaves below the modules \['blocks_1/mlp'\]"):
        wemoe.fit(experts, calibration=blind, steps=0)


def test_an_entropy_that_is_not_finite_stops():
    case = net.case(2)
    bad = net.calibration([case[2][0], np.full_like(case[2][1], np.nan)], case[3])
    with pytest.raises(FloatingPointError, match="entropy of task 1 in step 1 is nan"):
        _fit(case, calibration=bad, steps=2)


def test_bad_task_weights_and_chunk():
    case = net.case(2)
    state = _fit(case)
    with pytest.raises(ValueError, match="task: got 2"):
        wemoe.recover(state, 2)
    with pytest.raises(ValueError, match=r"weights: got shape \(3,\)"):
        wemoe.mix(state, np.ones(3))
    for function in (wemoe.predict, wemoe.weights):
        with pytest.raises(ValueError, match="chunk: got 0"):
            function(state, case[4], {"x": case[2][0]}, chunk=0)
