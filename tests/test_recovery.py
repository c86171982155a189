import jax
import numpy as np
import pytest
import tiny

from retex_jax import models, offsets, protocols, recovery, tree
from retex_jax.identifier import IDENTIFIERS, subspace

BATCH = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.trained(tmp_path_factory)


@pytest.fixture(scope="module")
def apply(run):
    """The model itself, compiled for one batch of 13."""
    model = run.backbone.model
    return jax.jit(lambda params, images: model.apply({"params": params}, {"image": images}))


def recover(run):
    return lambda task: offsets.recover(run.released.state, task)


def mixed(run, count):
    return {name: array[:count] for name, array in protocols.mixed_test(run.tasks, seed=1).items()}


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_run_gives_what_the_model_gives(run, apply, layer):
    params, inputs = recover(run)(0), mixed(run, 13)
    whole = apply(params, inputs["image"])
    want = whole.layers[layer - 1] if layer else whole.pooled
    for batch_size in (BATCH, 5, 1, 13):
        found = recovery.run(run.backbone.model, params, inputs, batch_size, layer=layer)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_texts_of_many_lengths_keep_their_order():
    config = models.BertConfig(
        vocab_size=50, width=8, num_layers=1, num_heads=2, mlp_dim=8, max_length=40
    )
    model = models.Bert(config)
    params = models.init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    mask = (np.arange(40) < rng.permutation(np.arange(3, 36, 3))[:, None]).astype(np.int32)
    texts = {"input_ids": rng.integers(1, 50, mask.shape, np.int32), "attention_mask": mask}
    want = jax.jit(lambda: model.apply({"params": params}, texts).pooled)()
    found = recovery.run(model, params, texts, 4)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_layers_differ(run):
    """So that the test above can tell them apart."""
    params, inputs = recover(run)(0), mixed(run, 13)
    features = [recovery.run(run.backbone.model, params, inputs, BATCH, layer=i) for i in range(3)]
    for i in range(3):
        assert np.abs(features[i] - features[i - 1]).max() > 0.1


def test_run_leaves_out_what_the_model_does_not_read(run):
    params, inputs = recover(run)(0), mixed(run, 13)
    odd = {**inputs, "label": inputs["label"][:2], "task": np.array(["a"])}
    found = recovery.run(run.backbone.model, params, odd, BATCH)
    want = recovery.run(run.backbone.model, params, {"image": inputs["image"]}, BATCH)
    np.testing.assert_array_equal(found, want)


def test_logits_by_hand():
    head = {"kernel": np.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]), "bias": np.array([0, 0, 0.5])}
    found = recovery.logits(head, np.array([[3.0, 1.0], [0.0, 2.0]]))
    np.testing.assert_allclose(found, [[3, 1, 5.5], [0, 2, -1.5]])


def test_identify_takes_the_largest_score_of_the_merged_model(run, apply):
    inputs, released = mixed(run, 13), run.released
    features = apply(released.state.merged, inputs["image"]).layers[released.identifier.layer - 1]
    scores = subspace.scores(released.identifier.state, features)
    found = recovery.identify(
        run.backbone.model, released.state.merged, released.identifier, inputs, BATCH
    )
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.asarray(scores).argmax(axis=1))
    assert set(found) == {0, 1, 2}


@pytest.mark.parametrize("kind", IDENTIFIERS)
@pytest.mark.parametrize("layer", [1, (1, 2), (2, 0)])
def test_any_identifier_on_any_layers(run, apply, kind, layer):
    method, merged = IDENTIFIERS[kind], run.released.state.merged
    inputs, layers = mixed(run, 13), (layer,) if isinstance(layer, int) else layer

    def chosen(params, images):
        whole = apply(params, images)
        parts = [np.asarray(whole.layers[i - 1] if i else whole.pooled) for i in layers]
        return parts[0] if isinstance(layer, int) else np.stack(parts, axis=1)

    params = [recover(run)(task) if method.needs_experts else merged for task in range(3)]
    calibration = [
        chosen(one, task.splits["train"]["image"][:40])
        for one, task in zip(params, run.tasks, strict=True)
    ]
    options = {"rank": 3} if kind == "subspace" else {"epochs": 5} if kind == "router" else {}
    identifier = recovery.Identifier(method.fit(calibration, **options), layer, kind)
    every = [chosen(one, inputs["image"]) for one in params]
    features = np.stack(every) if method.needs_experts else every[0]
    found = recovery.task_scores(run.backbone.model, merged, identifier, inputs, 5, recover(run))
    np.testing.assert_allclose(
        found, method.scores(identifier.state, features), rtol=1e-3, atol=1e-3
    )
    task_ids = recovery.identify(run.backbone.model, merged, identifier, inputs, 5, recover(run))
    np.testing.assert_array_equal(task_ids, found.argmax(axis=1))
    if method.needs_experts:
        with pytest.raises(ValueError, match="recover: got None, but 'mahalanobis' needs every"):
            recovery.identify(run.backbone.model, merged, identifier, inputs, 5)


@pytest.mark.parametrize(
    "task_ids",
    [
        [0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 0, 2, 1],
        [0] * 13,
        [2] * 13,
        [0] * 6 + [2] * 7,
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
    ],
    ids=["mixed", "all of the first", "all of the last", "none of one", "one of two"],
)
def test_grouped_agrees_with_each_example_alone(run, apply, task_ids):
    inputs, task_ids = mixed(run, 13), np.array(task_ids, np.int32)
    recovered = []

    def counted(task):
        recovered.append(task)
        return recover(run)(task)

    found = recovery.run_grouped(run.backbone.model, counted, inputs, task_ids, 4)
    assert sorted(recovered) == sorted(set(task_ids.tolist()))
    assert all(type(task) is int for task in recovered)
    by_task = [apply(recover(run)(task), inputs["image"]).pooled for task in range(3)]
    want = np.stack([np.asarray(by_task[task])[i] for i, task in enumerate(task_ids)])
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    alone = [
        recovery.run(
            run.backbone.model, recover(run)(int(task)), {"image": inputs["image"][i : i + 1]}, 4
        )[0]
        for i, task in enumerate(task_ids[:4])
    ]
    np.testing.assert_allclose(found[:4], alone, rtol=1e-5, atol=1e-6)


def test_grouped_does_not_depend_on_the_order(run):
    inputs = mixed(run, 13)
    task_ids = np.arange(13) % 3
    found = recovery.run_grouped(run.backbone.model, recover(run), inputs, task_ids, 4)
    order = np.random.default_rng(0).permutation(13)
    shuffled = {name: array[order] for name, array in inputs.items()}
    other = recovery.run_grouped(run.backbone.model, recover(run), shuffled, task_ids[order], 4)
    np.testing.assert_allclose(other, found[order], rtol=1e-5, atol=1e-6)


def test_grouped_tells_tasks_apart(run):
    """Features of two experts differ, so that a wrong grouping could not pass above."""
    inputs = mixed(run, 13)
    first, second = (
        recovery.run_grouped(run.backbone.model, recover(run), inputs, np.full(13, task), 4)
        for task in (0, 1)
    )
    assert (np.abs(first - second).max(axis=1) > 0.05).all()


def test_grouped_without_examples(run):
    inputs = mixed(run, 0)
    found = recovery.run_grouped(run.backbone.model, recover(run), inputs, inputs["task"], 4)
    assert found.shape == (0, 16)


def test_recovered_experts_are_near_the_experts(run):
    """Of a rank that holds most of the offsets: far nearer than the merged model."""
    from retex_jax.experts import read_safetensors

    merged = tree.flatten(run.released.state.merged)
    for task, name in enumerate(tiny.NAMES):
        parts = read_safetensors(run.experts / f"{name}.safetensors")
        del parts["head"]
        expert, recovered = tree.flatten(parts), tree.flatten(recover(run)(task))
        assert expert.keys() == recovered.keys()
        lost = sum(np.sum((recovered[leaf] - expert[leaf]) ** 2) for leaf in expert)
        offset = sum(np.sum((merged[leaf] - expert[leaf]) ** 2) for leaf in expert)
        assert lost < 0.1 * offset
