import jax
import numpy as np
import pytest
import references_identifier as ref

from retex_jax import ExpertSet, offsets, tree
from retex_jax.identifier import weights


def _scores(num_tasks=3, count=5):
    return np.random.default_rng(0).normal(size=(count, num_tasks)).astype("f4")


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
def test_weights_equal_the_reference(num_tasks):
    scores = _scores(num_tasks)
    np.testing.assert_array_equal(
        weights.hard(scores), np.eye(num_tasks, dtype="f4")[scores.argmax(axis=1)]
    )
    for temperature in (0.05, 1.0, 7.0):
        found = weights.soft(scores, temperature)
        np.testing.assert_allclose(found, ref.softmax(np.float64(scores) / temperature), rtol=1e-4)
        with jax.disable_jit():
            np.testing.assert_allclose(weights.soft(scores, temperature), found, rtol=1e-5)
    np.testing.assert_allclose(weights.uniform(scores), np.full((5, num_tasks), 1 / num_tasks))
    for rule in (weights.hard, weights.soft, weights.uniform):
        assert rule(scores).dtype == np.float32
        np.testing.assert_allclose(
            weights.of_task(rule(scores)), np.asarray(rule(scores)).mean(0), rtol=1e-5
        )


def test_soft_lies_between_hard_and_uniform():
    scores = _scores()
    np.testing.assert_allclose(weights.soft(scores, 1e-4), weights.hard(scores), atol=1e-6)
    np.testing.assert_allclose(weights.soft(scores, 1e6), weights.uniform(scores), atol=1e-5)
    np.testing.assert_array_equal(weights.hard(np.zeros((1, 3))), [[1, 0, 0]])


def test_bad_temperature():
    for bad in (0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="temperature: got"):
            weights.soft(_scores(), bad)


def test_similarity_is_the_cosine_of_the_mean_class_names():
    rng = np.random.default_rng(0)
    unseen, seen = 1 + rng.random((4, 7)), [1 + rng.random((n, 7)) for n in (1, 3, 6)]
    own, others = unseen.mean(axis=0), [x.mean(axis=0) for x in seen]
    cosines = [x @ own / np.sqrt((x @ x) * (own @ own)) for x in others]
    found = weights.similarity(unseen, seen)
    np.testing.assert_allclose(found, np.array(cosines) / sum(cosines), rtol=1e-6)
    assert found.dtype == np.float32
    np.testing.assert_allclose(weights.similarity(unseen, seen[:1]), [1])
    # By hand: cosines 1, 0.6 and -1, of which the last counts as 0.
    by_hand = [np.array([[1.0, 0], [3, 0]]), np.array([[3.0, 4]]), np.array([[-1.0, 0]])]
    np.testing.assert_allclose(
        weights.similarity(np.array([[2.0, 1], [2, -1]]), by_hand), [0.625, 0.375, 0], rtol=1e-6
    )


def test_similarity_lists_all_problems():
    good = np.ones((2, 3))
    with pytest.raises(ValueError, match="unseen") as error:
        weights.similarity(np.ones(3), [good, np.ones((2, 2)), np.ones((0, 3))])
    starts = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert starts == ["unseen", "seen[0]", "seen[1]", "seen[2]"]
    with pytest.raises(ValueError, match="seen: got no task"):
        weights.similarity(good, [])
    with pytest.raises(ValueError, match="positive cosine"):
        weights.similarity(good, [-good])


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2},
        {"rank": 2, "solver": "adam", "steps": 4, "warmup_steps": 1},
        {"budget": 0.7, "sharing": "auto", "bits": 8},
    ],
    ids=["shared", "generator", "coded"],
)
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_weights_on_embeddings_are_weights_on_offsets(options, num_tasks):
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (6, 5), "a/bias": (5,), "scale": (), "conv/kernel": (2, 2, 3, 4)}

    def draw():
        return {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}

    start = draw()
    experts = [
        {name: x + np.float32(0.3) * draw()[name] for name, x in start.items()}
        for _ in range(num_tasks)
    ]
    trees = [tree.unflatten(x) for x in (start, *experts)]
    state = offsets.fit(ExpertSet.from_trees(trees[0], trees[1:]), **options)
    merged = tree.flatten(state.merged)
    each = [tree.flatten(offsets.recover(state, task)) for task in range(num_tasks)]
    for w in np.asarray(weights.soft(_scores(num_tasks))):
        mixed = tree.flatten(offsets.mix(state, w))
        for name, leaf in merged.items():
            start64 = np.float64(leaf)
            want = start64 + sum(
                v * (np.float64(x[name]) - start64) for v, x in zip(w, each, strict=True)
            )
            np.testing.assert_allclose(mixed[name], want, rtol=1e-5, atol=1e-5, err_msg=name)
