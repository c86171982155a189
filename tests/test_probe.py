import jax
import numpy as np
import pytest

from retex_jax import probe

linear_model = pytest.importorskip("sklearn.linear_model")


NUM, DIMS, NUM_CLASSES = 200, 12, 4  # one shape, compiled once


def problem(noise, num=600, seed=0):
    """Gaussian classes on features of very different scales and means, one of them constant."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(NUM_CLASSES, DIMS))
    labels = rng.integers(0, NUM_CLASSES, num)
    features = centers[labels] + noise * rng.normal(size=(num, DIMS))
    features = features * 10.0 ** rng.integers(-2, 3, DIMS) + rng.normal(0, 5, DIMS)
    features[:, -1] = 3.0
    return features.astype("f4"), labels.astype("i4")


def fit(features, labels, val=slice(NUM, 300), num_classes=NUM_CLASSES):
    return probe.fit(features[:NUM], labels[:NUM], features[val], labels[val], num_classes)


def accuracy(kernel, bias, features, labels):
    logits = features.astype("f8") @ np.asarray(kernel, "f8") + np.asarray(bias, "f8")
    return np.mean(logits.argmax(axis=1) == labels)


def standardized(features):
    return (features - features[:NUM].mean(axis=0)) / (features[:NUM].std(axis=0) + 1e-6)


def reference(features, labels, penalty):
    """The same objective: mean cross-entropy + penalty * |kernel|^2, none on the bias."""
    model = linear_model.LogisticRegression(C=1 / (2 * NUM * penalty), tol=1e-8, max_iter=5000)
    return model.fit(standardized(features)[:NUM], labels[:NUM])


def test_probe_is_as_good_as_scikit_learns():
    features, labels = problem(noise=1.5)
    found = fit(features, labels)
    inputs = standardized(features)
    models = [reference(features, labels, penalty) for penalty in probe.PENALTIES]
    best = max(models, key=lambda model: model.score(inputs[NUM:300], labels[NUM:300]))
    want = best.score(inputs[300:], labels[300:])
    assert 0.5 < want < 0.99
    assert abs(accuracy(*found, features[300:], labels[300:]) - want) <= 0.02


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_coefficients_are_scikit_learns(monkeypatch, penalty):
    features, labels = problem(noise=1.0)
    monkeypatch.setattr(probe, "PENALTIES", (penalty,) * 4)
    found = fit(features, labels)
    model = reference(features, labels, penalty)
    scale = features[:NUM].std(axis=0) + 1e-6
    kernel = np.asarray(found.kernel) * scale[:, None]
    np.testing.assert_allclose(kernel[:-1], model.coef_.T[:-1], rtol=1e-2, atol=1e-2)
    bias = np.asarray(found.bias) + features[:NUM].mean(axis=0) @ np.asarray(found.kernel)
    want = model.intercept_
    np.testing.assert_allclose(bias - bias.mean(), want - want.mean(), rtol=1e-2, atol=1e-2)


def test_penalty_is_chosen_on_the_validation_data(monkeypatch):
    features, labels = problem(noise=3.0, seed=1)
    accuracies = []
    for penalty in probe.PENALTIES:
        with monkeypatch.context() as patch:
            patch.setattr(probe, "PENALTIES", (penalty,) * 4)
            one = fit(features, labels, val=slice(NUM, 600))
        accuracies.append(accuracy(*one, features[NUM:], labels[NUM:]))
    assert len(set(accuracies)) > 1
    best = accuracies[int(np.argmax(accuracies))]
    assert accuracies[0] < best  # else choosing the first would pass
    found = fit(features, labels, val=slice(NUM, 600))
    assert accuracy(*found, features[NUM:], labels[NUM:]) == best


def test_class_that_never_occurs_is_no_trouble():
    features, labels = problem(noise=1.0)
    found = fit(features, labels % 3)
    assert (found.kernel.shape, found.bias.shape) == ((DIMS, NUM_CLASSES), (NUM_CLASSES,))
    assert found.kernel.dtype == found.bias.dtype == np.float32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert accuracy(*found, features[300:], labels[300:] % 3) > 0.5


def test_numbers_are_predicted_by_ridge_regression(monkeypatch):
    """The objective, mean squared error + penalty * |kernel|^2 on standardised features, in closed form."""
    features, _ = problem(noise=1.0)
    rng = np.random.default_rng(3)
    labels = (standardized(features)[:, 0] + 0.3 * rng.normal(size=len(features)) + 2).astype("f4")
    monkeypatch.setattr(probe, "PENALTIES", (0.03,) * 4)
    found = fit(features, labels, num_classes=1)
    inputs = standardized(features)[:NUM].astype("f8")
    mean = labels[:NUM].mean()
    kernel = np.linalg.solve(
        inputs.T @ inputs / NUM + 0.03 * np.eye(DIMS), inputs.T @ (labels[:NUM] - mean) / NUM
    )
    want = standardized(features)[NUM:] @ kernel + mean
    got = features[NUM:] @ np.asarray(found.kernel) + np.asarray(found.bias)
    np.testing.assert_allclose(got[:, 0], want, atol=2e-3)


def test_number_probe_of_least_error_is_chosen():
    features = np.array([[1.0], [2.0]], "f4")
    probes = [
        probe.Probe(np.full((1, 1), slope, "f4"), np.zeros(1, "f4")) for slope in (3.0, 1.1, 0.0)
    ]
    assert probe.select(probes, features, np.array([1.0, 2.0], "f4")) is probes[1]
