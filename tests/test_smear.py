import jax
import numpy as np
import pytest
import references
import references_routed as ref
import routed_model as net

from retex_jax.personalized import router, routing, smear

FAST = {"epochs": 5, "batch_size": 16}


def _fit(case, **options):
    options = {"calibration": case[4], "router_options": FAST, **options}
    return smear.fit(net.experts(case[0], case[1]), **options)


def _merged(case, weights):
    """sum_t w_t theta_t, as SMEAR has it."""
    return {
        name: sum(w * m[name].astype(np.float64) for w, m in zip(weights, case[1], strict=True))
        for name in case[0]
        if name != "steps"
    }


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
def test_weights_of_sum_one_average_the_experts(num_tasks):
    case = net.case(num_tasks)
    state = _fit(case)
    for weights in (np.full(num_tasks, 1 / num_tasks), np.eye(num_tasks)[0]):
        net.assert_model(smear.mix(state, weights), _merged(case, weights))
    net.assert_model(
        smear.recover(state, num_tasks - 1), _merged(case, np.eye(num_tasks)[-1]), 1e-6, 1e-6
    )


def test_prediction_is_one_merged_model_an_input():
    case = net.case(3)
    state = _fit(case)
    batch, _ = net.mixed_batch(case[2])
    start = ref.features({n: np.float64(x) for n, x in case[0].items()}, batch["x"])
    logits = ref.linear_router(jax.device_get(state.router.variables), start)
    weights = ref.softmax(logits)
    np.testing.assert_allclose(smear.weights(state, start), weights, rtol=1e-4, atol=1e-5)
    want = [
        ref.features(_merged(case, w), x[None])[0] for w, x in zip(weights, batch["x"], strict=True)
    ]
    for chunk in (1, 5, 100):
        found = smear.predict(state, case[4], batch, chunk=chunk)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_a_batch_equals_its_examples_alone():
    case = net.case(2)
    state = _fit(case)
    batch, _ = net.mixed_batch(case[2])
    whole = smear.predict(state, case[4], batch)
    for index in (0, 7):
        alone = smear.predict(state, case[4], {"x": batch["x"][index : index + 1]})
        np.testing.assert_allclose(whole[index], alone[0], rtol=1e-5, atol=1e-6)


def test_the_router_learns_separable_tasks():
    case = net.case(3)
    state = smear.fit(net.experts(case[0], case[1]), calibration=case[4])
    batch, tasks = net.mixed_batch(ref.inputs(3)[:3], seed=5)
    weights = np.asarray(smear.weights(state, net.features(state.pretrained, batch)))
    np.testing.assert_array_equal(weights.argmax(axis=1), tasks)
    assert weights[np.arange(len(tasks)), tasks].mean() > 0.8


def test_no_true_task_or_label_decides():
    case = net.case(3)
    state = _fit(case)
    batch, tasks = net.mixed_batch(case[2])
    want = np.asarray(smear.predict(state, case[4], batch))
    for label in (tasks, tasks[::-1]):
        labelled = batch | {"label": label.astype(np.int32)}
        np.testing.assert_array_equal(smear.predict(state, case[4], labelled), want)


def test_the_key_decides_the_router():
    case = net.case(2)
    first, again, other = (
        jax.device_get(_fit(case, key=jax.random.key(seed)).router) for seed in (3, 3, 4)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [r.variables["params"]["out"]["kernel"] for r in (first, other)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


def test_order_of_tasks_does_not_matter():
    pretrained, models, xs, heads, calibration = net.case(3)
    order = [2, 0, 1]
    first = smear.fit(
        net.experts(pretrained, models, "abc"), calibration=calibration, router_options=FAST
    )
    second = smear.fit(
        net.experts(pretrained, [models[t] for t in order], "cab"),
        calibration=net.calibration([xs[t] for t in order], heads),
        router_options=FAST,
    )
    batch, _ = net.mixed_batch(xs)
    np.testing.assert_allclose(
        smear.predict(second, calibration, batch),
        smear.predict(first, calibration, batch),
        rtol=1e-5,
        atol=1e-6,
    )


def test_bytes_are_those_of_the_experts_and_the_router():
    case = net.case(2)
    size = sum(leaf.size for name, leaf in case[0].items() if name != "steps")
    assert smear.extra_bytes(_fit(case)) == 4 * (2 * size + ref.WIDTH * 2 + 2)


def test_jit_and_traced_task():
    state = _fit(net.case(2))
    want = references.flat(smear.recover(state, 1))
    want.pop("steps")
    net.assert_model(jax.jit(smear.recover)(state, 1), want, 1e-6, 1e-6)


def test_bad_inputs():
    case = net.case(2)
    with pytest.raises(ValueError, match="SMEAR over frozen experts needs inputs"):
        smear.fit(net.experts(case[0], case[1]))
    state = _fit(case)
    with pytest.raises(ValueError, match="task: got 2"):
        smear.recover(state, 2)
    with pytest.raises(ValueError, match=r"weights: got shape \(1,\)"):
        smear.mix(state, np.ones(1))
    for chunk in (0, True, 1.5):
        with pytest.raises(ValueError, match="chunk: got"):
            smear.predict(state, case[4], {"x": case[2][0]}, chunk=chunk)
    with pytest.raises(ValueError, match="weights: got B = 2"):
        routing.predict(net.features, smear.mix, state, np.ones((2, 2)), {"x": case[2][0]}, chunk=1)
    with pytest.raises(ValueError, match="kind: got"):
        router.fit([np.ones((3, 2))], "a", jax.random.key(0), kind="lin")
