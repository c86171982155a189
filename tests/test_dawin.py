import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_routed as ref
import routed_model as net

from retex_jax.personalized import dawin


def _fit(case, **options):
    return dawin.fit(net.experts(case[0], case[1]), **{"calibration": case[4], **options})


def _vectors(case):
    return ref.differences(case[0], case[1])


def _weights(case, x, head=None, temperatures=None):
    """softmax_t(-H_t(x)), [B, T], with the head of each expert or with one."""
    entropies = []
    for task, expert in enumerate(case[1]):
        logits = ref.features(expert, x) @ np.float64(case[3][task if head is None else head])
        temperature = 1 if temperatures is None else temperatures[task]
        entropies.append(ref.entropy(logits / temperature))
    return ref.softmax(-np.stack(entropies, axis=1))


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("scaling", [0.3, 0.7])
def test_mixtures(num_tasks, scaling):
    case = net.case(num_tasks)
    state = _fit(case, scaling=scaling)
    weights = np.linspace(-0.5, 1, num_tasks)
    want = ref.mixture(case[0], _vectors(case), scaling * num_tasks * weights)
    net.assert_model(dawin.mix(state, weights), want)
    own = np.eye(num_tasks)[num_tasks - 1]
    want = ref.mixture(case[0], _vectors(case), scaling * num_tasks * own)
    net.assert_model(dawin.recover(state, num_tasks - 1), want)
    uniform = np.full(num_tasks, 1 / num_tasks)
    want = ref.task_arithmetic(case[0], case[1], scaling)
    net.assert_model(dawin.mix(state, uniform), want)


def test_the_experts_are_kept_to_the_last_bit():
    case = net.case(2)
    state = _fit(case)
    for task, expert in enumerate(case[1]):
        for name, leaf in references.flat(dawin.expert_params(state, task)).items():
            np.testing.assert_array_equal(leaf, expert[name])


def test_entropy_weights_by_hand():
    # Two classes at 1 : 3, and uniform over three: H = 2 ln 2 - 3/4 ln 3 and ln 3.
    logits = [np.log(np.float32([[1, 3]])), np.zeros((1, 3), np.float32)]
    powers = np.array([2**-2 * 3**0.75, 1 / 3])
    found = dawin.entropy_weights(logits, np.ones(2))
    np.testing.assert_allclose(found, powers[None] / powers.sum(), rtol=1e-6)
    # Temperature 2 makes the first 1 : sqrt(3).
    p = 1 / (1 + 3**0.5)
    powers[0] = np.exp(p * np.log(p) + (1 - p) * np.log(1 - p))
    found = dawin.entropy_weights(logits, np.array([2.0, 1.0]))
    np.testing.assert_allclose(found, powers[None] / powers.sum(), rtol=1e-6)


def test_a_certain_expert_has_a_finite_entropy():
    logits = [np.float32([[200, -200]]), np.float32([[0, 0]])]
    found = dawin.entropy_weights(logits, np.ones(2))
    np.testing.assert_allclose(found, [[2 / 3, 1 / 3]], rtol=1e-6)


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_per_sample_prediction(num_tasks):
    case = net.case(num_tasks)
    temperatures = [1.0, 0.5, 2.0][:num_tasks]
    state = _fit(case, temperatures=temperatures)
    batch, _ = net.mixed_batch(case[2])
    weights = _weights(case, batch["x"], temperatures=temperatures)
    np.testing.assert_allclose(dawin.weights(state, case[4], batch), weights, rtol=1e-4, atol=1e-5)
    want = [
        ref.features(ref.mixture(case[0], _vectors(case), 0.3 * num_tasks * w), x[None])[0]
        for w, x in zip(weights, batch["x"], strict=True)
    ]
    for chunk in (5, 100):
        found = dawin.predict(state, case[4], batch, chunk=chunk)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", ["own", "data_set"])
def test_the_mixture_has_one_merge_a_data_set(heads):
    case = net.case(3)
    state = _fit(case, variant="mixture", heads=heads)
    for task, x in enumerate(case[2]):
        mean = _weights(case, x, None if heads == "own" else task).mean(axis=0)
        np.testing.assert_allclose(state.set_weights[task], mean, rtol=1e-4, atol=1e-5)
        want = ref.mixture(case[0], _vectors(case), 0.9 * mean)
        net.assert_model(dawin.recover(state, task), want)


def test_the_mixture_predicts_a_batch_with_one_merge():
    case = net.case(3)
    state = _fit(case, variant="mixture")
    batch, _ = net.mixed_batch(case[2])
    mean = _weights(case, batch["x"]).mean(axis=0)
    want = ref.features(ref.mixture(case[0], _vectors(case), 0.9 * mean), batch["x"])
    np.testing.assert_allclose(dawin.predict(state, case[4], batch), want, rtol=1e-4, atol=1e-5)


def test_robust_interpolates_two_models():
    case = net.case(2)
    case[1][0] = case[0]  # the zero-shot model
    state = _fit(case, variant="robust", temperatures=(0.9576, 0.9733))
    x = case[2][1]
    entropies = [
        ref.entropy(ref.features(model, x) @ np.float64(head) / temperature)
        for model, head, temperature in zip(case[1], case[3], (0.9576, 0.9733), strict=True)
    ]
    powers = np.exp(-np.stack(entropies))
    share = powers[1] / (powers[0] + powers[1])
    want = []
    for l, example in zip(share, x, strict=True):  # noqa: E741
        params = {
            name: (1 - l) * leaf.astype(np.float64) + l * case[1][1][name]
            for name, leaf in case[0].items()
            if name != "steps"
        }
        want.append(ref.features(params, example[None])[0])
    found = dawin.predict(state, case[4], {"x": x})
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    for task in range(2):
        want = {name: leaf for name, leaf in case[1][task].items() if name != "steps"}
        net.assert_model(dawin.recover(state, task), want, 1e-6, 1e-6)


def test_no_true_task_or_label_decides():
    case = net.case(3)
    state = _fit(case)
    batch, tasks = net.mixed_batch(case[2])
    labelled = batch | {"label": tasks.astype(np.int32), "task": tasks.astype(np.int32)}
    wrong = labelled | {"label": labelled["label"][::-1], "task": (labelled["task"] + 1) % 3}
    want = np.asarray(dawin.predict(state, case[4], batch))
    for other in (labelled, wrong):
        np.testing.assert_array_equal(dawin.predict(state, case[4], other), want)
    order = np.random.default_rng(1).permutation(len(tasks))
    shuffled = dawin.predict(state, case[4], {"x": batch["x"][order]})
    np.testing.assert_allclose(shuffled, want[order], rtol=1e-5, atol=1e-6)


def test_order_of_tasks_does_not_matter():
    pretrained, models, xs, heads, calibration = net.case(3)
    order = [2, 0, 1]
    other_model = net.calibration(xs, [heads[t] for t in order])
    first = dawin.fit(net.experts(pretrained, models))
    second = dawin.fit(net.experts(pretrained, [models[t] for t in order]))
    batch, _ = net.mixed_batch(xs)
    np.testing.assert_allclose(
        dawin.weights(second, other_model, batch),
        np.asarray(dawin.weights(first, calibration, batch))[:, order],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        dawin.predict(second, other_model, batch),
        dawin.predict(first, calibration, batch),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_stored_as_it_is(dtype):
    def cast(model):
        return {n: x if n == "steps" else x.astype(dtype) for n, x in model.items()}

    pretrained, models = ref.models(2)
    state = dawin.fit(net.experts(cast(pretrained), [cast(model) for model in models]), scaling=0.5)
    for name, leaf in references.flat(dawin.recover(state, 1)).items():
        want = cast(models[1])[name]
        assert leaf.dtype == want.dtype
        np.testing.assert_allclose(
            leaf.astype(np.float64), want.astype(np.float64), rtol=2**-7, atol=1e-6
        )
    size = sum(leaf.size for name, leaf in pretrained.items() if name != "steps")
    assert dawin.extra_bytes(state) == 2 * 2 * size + 4 * 3  # experts, coefficient, temperatures


def test_traced_task_jit_and_sharded_are_equal(place_on_8_devices):
    case = net.case(2)
    state = dawin.fit(net.experts(case[0], case[1]))
    want = references.flat(dawin.recover(state, 1))
    want.pop("steps")
    net.assert_model(jax.jit(dawin.recover)(state, 1), want, 1e-6, 1e-6)
    with jax.disable_jit():
        net.assert_model(dawin.recover(state, 1), want, 1e-6, 1e-6)
    sharded = [place_on_8_devices(model) for model in (case[0], *case[1])]
    found = dawin.recover(dawin.fit(net.experts(sharded[0], sharded[1:])), jnp.int32(1))
    net.assert_model(found, want, 1e-6, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "robust"}, "experts: got T = 3, expected 2 for variant 'robust'"),
        ({"variant": "sample", "heads": "all"}, r"(?s)variant: got 'sample'.*heads: got 'all'"),
        ({"temperatures": [1.0, 2.0]}, "temperatures: got"),
        ({"temperatures": [1.0, 2.0, 0.0]}, "temperatures: got"),
        ({"scaling": np.inf}, "scaling: got inf"),
        ({"variant": "mixture", "calibration": None}, "mixture of DaWin needs inputs"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        _fit(net.case(3), **options)


def test_bad_task_weights_and_chunk():
    case = net.case(2)
    for variant in ("per_sample", "mixture"):
        state = _fit(case, variant=variant)
        with pytest.raises(ValueError, match="task: got -1"):
            dawin.recover(state, -1)
        with pytest.raises(ValueError, match="chunk: got 0"):
            dawin.predict(state, case[4], {"x": case[2][0]}, chunk=0)
    with pytest.raises(ValueError, match=r"weights: got shape \(3,\)"):
        dawin.mix(state, np.ones(3))
