"""All recovery modes against grouped recovery, and the factors against the offsets that they stand for."""

import dataclasses
import functools
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_recovery as ref

import retex_jax as rtx
from retex_jax import data, models, offsets, recovery, tree
from retex_jax.models import stacking
from retex_jax.offsets.forms import Elementwise, Product
from retex_jax.offsets.state import generate
from retex_jax.recovery import factored, grouped, modes, planning
from retex_jax.recovery.modes import ParamsCache
from retex_jax.recovery.terms import leaf_terms

SIZES = {"width": 12, "num_layers": 1, "num_heads": 2, "mlp_dim": 20}
VISION = models.ViTConfig(image_size=8, patch_size=4, layer_scale=True, **SIZES)
BERT = models.BertConfig(vocab_size=30, max_length=8, **SIZES)
MODELS = {
    "vit": models.ViT(VISION),
    "clip vision": models.ViT(
        dataclasses.replace(
            VISION,
            pre_norm=True,
            patch_bias=False,
            layer_scale=False,
            activation="quick_gelu",
            projection_dim=5,
            normalize=True,
        )
    ),
    "vit, both pools": models.ViT(dataclasses.replace(VISION, pool="cls_mean")),
    "clip text": models.ClipText(
        models.ClipTextConfig(
            vocab_size=30, max_length=8, projection_dim=5, eos_token_id=29, **SIZES
        )
    ),
    "bert": models.Bert(dataclasses.replace(BERT, num_layers=2)),
    "roberta": models.Bert(dataclasses.replace(BERT, padding_idx=1, num_token_types=1, pool="cls")),
    "gpt2": models.Gpt2(models.Gpt2Config(vocab_size=30, max_length=8, **SIZES)),
    "decoder": models.Decoder(
        models.DecoderConfig(
            vocab_size=30, num_kv_heads=1, max_length=8, qkv_bias=True, lm_head="untied", **SIZES
        )
    ),
    "decoder, tied": models.Decoder(
        models.DecoderConfig(vocab_size=30, max_length=8, lm_head="tied", **SIZES)
    ),
}
FITS = {
    "right": {"rank": 3},
    "left": {"rank": 3, "orientation": "left"},
    "full rank": {"rank": 12, "rank_rule": "clip", "orientation": "auto"},
    "coded": {"rank": 3, "bits": 4, "vector_bits": 8},
    "one bit": {"rank": 3, "orientation": "left", "bits": 1, "vector_bits": 2},
    "separate": {"budget": 0.4, "sharing": "separate"},
    "separate, coded": {"budget": 0.4, "sharing": "separate", "bits": 3, "vector_bits": 4},
    "auto": {"budget": 0.5, "sharing": "auto", "orientation": "auto"},
    "factorized": {"rank": 4, "form": "factorized", "task_rank": 2},
    "affine": {"rank": 3, "form": "affine", "orientation": "left"},
    "tied": {"rank": 3, "form": "shape_shared"},
    "generator": {"rank": 3, "d_emb": 2},
}
NUM_TASKS = 4


def random_params(model, seed, scale=0.3):
    rng = np.random.default_rng(seed)
    expected = models.expected_params(model)
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), expected)


def experts_of(model, num_tasks):
    pretrained = random_params(model, 0)
    tasks = [
        jax.tree.map(jnp.add, pretrained, random_params(model, seed + 1, 0.1))
        for seed in range(num_tasks)
    ]
    return pretrained, tasks


@functools.cache
def fitted(model, fit="right", num_tasks=NUM_TASKS, *, added=0):
    """A state of so many tasks, the last of which were added one by one."""
    pretrained, tasks = experts_of(model, num_tasks)
    kept = num_tasks - added
    state = offsets.fit(rtx.ExpertSet.from_trees(pretrained, tasks[:kept]), **FITS[fit])
    for expert in tasks[kept:]:
        state = offsets.add_task(state, expert, budget=0.8)
    return state


def state_of(name, fit, added=0):
    return fitted(MODELS[name], fit, added=added)


def inputs_of(model, count, seed=5):
    rng = np.random.default_rng(seed)
    if "image" in model.example_batch():
        return {"image": rng.normal(size=(count, 8, 8, 3)).astype(np.float32)}
    lengths = rng.integers(2, 9, count)
    ids = rng.integers(2, 29, (count, 8)).astype(np.int32)
    mask = (np.arange(8) < lengths[:, None]).astype(np.int32)
    ids[np.arange(count), lengths - 1] = 29
    return {"input_ids": ids * mask, "attention_mask": mask}


def by_group(model, state, inputs, task_ids):
    return recovery.run_grouped(
        model, lambda task: offsets.recover(state, task), inputs, np.asarray(task_ids), 8
    )


def assert_agree(found, want):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def tells_apart(model, state, inputs, task_ids):
    """That another task's expert is far off, so that agreeing says something."""
    other = by_group(model, state, inputs, (np.asarray(task_ids) + 1) % state.num_tasks)
    want = by_group(model, state, inputs, task_ids)
    return (np.abs(other - want).max(axis=1) > 1e-2 * np.abs(want).max()).all()


MIXED = np.array([2, 0, 2, 3, 0, 2, 3, 3, 2, 0, 0])  # unsorted, and no input of task 1


def mostly_slow(values, *quick):
    """Parameters of a test, of which all but a few take part only where slow tests do."""
    return [pytest.param(x, marks=() if x in quick else pytest.mark.slow) for x in values]


@pytest.mark.parametrize("name", mostly_slow(MODELS, "bert", "decoder"))
def test_every_model_by_every_mode(name):
    """The first one is also what `test_mixtures` tries."""
    model = MODELS[name]
    state, inputs = fitted(model), inputs_of(model, len(MIXED))
    want = by_group(model, state, inputs, MIXED)
    assert tells_apart(model, state, inputs, MIXED)
    recoverer = recovery.Recoverer(model, state, max_batch=8)
    for mode in recovery.MODES:
        assert_agree(recoverer.features(inputs, MIXED, mode), want)


ADDED = [("right", 2), ("auto", 1)]
OF_TEXTS = [("right", 1), ("separate", 0), ("affine", 0)]
FORMS = [("vit", fit, 0) for fit in FITS] + [("vit", *form) for form in ADDED]
FORMS += [("roberta", *form) for form in OF_TEXTS]
WITHIN = [form for form in FORMS if form[1:] not in (("one bit", 0), ("separate, coded", 0))]
QUICK = [("vit", fit, n) for fit, n in (("left", 0), ("coded", 0), ("auto", 1), ("tied", 0))]


@pytest.mark.parametrize("form", mostly_slow(WITHIN, *QUICK), ids=str)
def test_every_form_in_factors(form):
    model, state = MODELS[form[0]], state_of(*form)
    inputs = inputs_of(model, len(MIXED))
    want = by_group(model, state, inputs, MIXED)
    assert_agree(recovery.Recoverer(model, state).features(inputs, MIXED, "factored"), want)


TERMS = [("vit", fit, 0) for fit in ("right", "separate", "factorized", "affine", "generator")]


@pytest.mark.parametrize("form", mostly_slow(FORMS, *TERMS, *QUICK), ids=str)
def test_terms_are_the_offsets(form):
    state = state_of(*form)
    merged = tree.flatten(state.merged)
    matrices = [leaf for leaf in state.offsets if merged[leaf].ndim > 1]
    assert len(matrices) >= 8
    for task in range(NUM_TASKS):
        wanted = generate(state, state.task_embeddings[task])
        for leaf in matrices:
            shape = merged[leaf].shape
            total = np.zeros((int(np.prod(shape[:-1])), shape[-1]))
            for term in leaf_terms(state, leaf, shape):
                product = np.eye(total.shape[0])
                for factor in np.array([None, *term], object)[1:]:
                    own = np.asarray(factor, np.float64)
                    product = product * own[task] if own.ndim == 1 else product
                    if own.ndim > 1:
                        product = product @ (own[task] if own.ndim == 3 else own)
                total += product
            want = np.asarray(wanted[leaf]).reshape(total.shape)
            np.testing.assert_allclose(
                total, want, rtol=1e-4, atol=1e-5 * np.abs(want).max() + 1e-12, err_msg=leaf
            )


def test_vectors_and_other_views_are_no_terms():
    state = state_of("vit", "right")
    assert leaf_terms(state, "cls_token", (12,)) is None
    torch = dataclasses.replace(state, layout="torch")
    assert leaf_terms(torch, "patch_embed/kernel", (4, 4, 3, 12)) is None
    assert len(leaf_terms(torch, "blocks_0/mlp/fc1/kernel", (12, 20))) == 1


def test_products_that_share_a_factor_are_one_term():
    state = state_of("vit", "right", 2)
    form = state.offsets["blocks_0/mlp/fc1/kernel"].base
    assert form.projection is not None and form.own is not None
    terms = leaf_terms(state, "blocks_0/mlp/fc1/kernel", (12, 20))
    assert [[factor.ndim for factor in term] for term in terms] == [[2, 3], [3, 3]]


def test_leaves_of_one_owner_share_their_factors():
    terms = factored.prepare(MODELS["vit"], state_of("vit", "tied")).terms
    query, key = (terms[f"blocks_0/attention/{part}/kernel"][0] for part in ("query", "key"))
    assert all(one is other for one, other in zip(query, key, strict=True))


class Net(nn.Module):
    """The network of `references_recovery`."""

    @nn.compact
    def __call__(self, batch):
        x = nn.Embed(11, 6, name="table")(batch["tokens"])
        start = self.param("start", nn.initializers.zeros_init(), (6,))
        x = jnp.concatenate([jnp.broadcast_to(start, (len(x), 1, 6)), x], axis=1)
        y = jnp.tanh(nn.Dense(7, name="dense")(x))
        return self.param("gain", nn.initializers.zeros_init(), ()) * y.sum(axis=1)

    def example_batch(self):
        return {"tokens": jnp.zeros((1, 2), jnp.int32)}


def net_state(merged, factors, num_tasks):
    orientations = {"table/embedding": "left", "dense/kernel": "right"}
    forms = {
        name: Product(*map(jnp.asarray, pair), orientations[name])
        if name in orientations
        else Elementwise(*map(jnp.asarray, pair))
        for name, pair in factors.items()
    }
    report = offsets.FitReport({}, {}, {}, {})
    return offsets.OffsetState.baked(tree.unflatten(merged), forms, report, num_tasks, "flax")


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
def test_factored_against_the_definition(num_tasks):
    merged, factors = ref.draw(num_tasks)
    state = net_state(merged, factors, num_tasks)
    rng = np.random.default_rng(3)
    tokens, ids = rng.integers(0, 11, (9, 5)), rng.integers(0, num_tasks, 9)
    prepared = factored.prepare(Net(), state)
    assert sorted(prepared.by_task) == ["dense/bias", "gain", "start"]
    found = jax.jit(lambda t, i: factored.apply(Net(), prepared, {"tokens": t}, i))(tokens, ids)
    want = ref.mixed(merged, factors, tokens, ids)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    eager = factored.apply(Net(), prepared, {"tokens": jnp.asarray(tokens)}, jnp.asarray(ids))
    np.testing.assert_allclose(eager, found, rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    """Reads its table by its call and besides."""

    @nn.compact
    def __call__(self, batch):
        table = nn.Embed(11, 6, name="table")
        return table(batch["tokens"]).sum(axis=1) @ table.embedding.T

    def example_batch(self):
        return {"tokens": jnp.zeros((1, 2), jnp.int32)}


def test_a_leaf_that_is_also_read_elsewhere_is_gathered():
    merged, factors = ref.draw(3)
    name = "table/embedding"
    state = net_state({name: merged[name]}, {name: factors[name]}, 3)
    prepared = factored.prepare(Tied(), state)
    assert (list(prepared.by_task), prepared.terms) == ([name], {})
    tokens, ids = np.array([[1, 4], [2, 2], [10, 0]]), np.array([2, 0, 2])
    found = factored.apply(Tied(), prepared, {"tokens": jnp.asarray(tokens)}, jnp.asarray(ids))
    for row, task in enumerate(ids):
        table = merged[name] + factors[name][1].T @ factors[name][0][task].T
        want = table[tokens[row]].sum(axis=0) @ table.T
        np.testing.assert_allclose(found[row], want, rtol=1e-4, atol=1e-4)


def test_what_the_model_does_not_read_is_not_recovered():
    model = MODELS["decoder"]
    prepared = factored.prepare(model, fitted(model))
    assert "lm_head/kernel" in prepared.merged
    assert "lm_head/kernel" not in {**prepared.by_task, **prepared.terms}
    assert all(leaf.ndim == 2 for leaf in prepared.by_task.values())  # vectors of every task


def test_no_big_leaf_is_kept_for_every_task():
    """Tables that are read whole, of positions and token types, are; kernels and word tables are not."""
    for name in ("vit", "bert", "gpt2"):
        prepared = factored.prepare(MODELS[name], fitted(MODELS[name]))
        tables = {leaf for leaf, stack in prepared.by_task.items() if stack.ndim > 2}
        assert tables <= {"position_embedding/embedding", "token_type_embedding/embedding"}


def test_a_classifier_as_a_whole():
    model = models.SequenceClassifier(MODELS["roberta"], 3, "roberta")
    pretrained, tasks = experts_of(model, 3)
    state = offsets.fit(rtx.ExpertSet.from_trees(pretrained, tasks), rank=3)
    inputs, ids = inputs_of(model, 5), np.array([2, 0, 1, 1, 2])
    prepared = factored.prepare(model, state)
    found = jax.jit(lambda batch, ids: factored.apply(model, prepared, batch, ids))(inputs, ids)
    run = jax.jit(lambda params: model.apply({"params": params}, inputs))
    wanted = [run(offsets.recover(state, task)) for task in range(3)]
    want = np.stack([np.asarray(wanted[task])[row] for row, task in enumerate(ids)])
    assert_agree(np.asarray(found), want)


HEADS = [("gpt2", "left"), ("decoder", "right"), ("decoder, tied", "separate")]


@pytest.mark.parametrize(("name", "fit"), [*HEADS, ("decoder, tied", "affine")])
def test_logits_of_language_models(name, fit):
    """A table that is the head as well is read twice, and no expert's is made."""
    model = MODELS[name]
    state, inputs, ids = fitted(model, fit), inputs_of(model, 5), np.array([3, 1, 1, 0, 3])
    prepared = factored.prepare(model, state, method="lm_logits")
    assert all("token_embedding" not in leaf for leaf in prepared.by_task)
    run = jax.jit(lambda tasks: factored.apply(model, prepared, inputs, tasks, method="lm_logits"))
    expert = jax.jit(lambda params: model.apply({"params": params}, inputs, method="lm_logits"))
    wanted = [np.asarray(expert(offsets.recover(state, task))) for task in range(NUM_TASKS)]
    want = np.stack([wanted[task][row] for row, task in enumerate(ids)])
    assert np.abs(want - wanted[2]).max() > 1e-2 * np.abs(want).max()
    assert_agree(np.asarray(run(jnp.asarray(ids))), want)
    weights = np.full((5, NUM_TASKS), 0.1, np.float32)
    weights[:, 2] = 0.7
    mixed = np.asarray(expert(offsets.mix(state, weights[0])))
    assert_agree(np.asarray(run(jnp.asarray(weights))), mixed)


def test_features_of_every_layer():
    model = MODELS["bert"]
    state, inputs = fitted(model), inputs_of(model, 5)
    ids = np.array([3, 1, 1, 0, 3])
    prepared = factored.prepare(model, state)
    found = jax.jit(lambda batch, ids: factored.apply(model, prepared, batch, ids))(inputs, ids)
    run = jax.jit(lambda params: model.apply({"params": params}, inputs).layers)
    wanted = [run(offsets.recover(state, task)) for task in range(NUM_TASKS)]
    want = np.stack([np.asarray(wanted[task])[:, row] for row, task in enumerate(ids)], axis=1)
    assert_agree(np.asarray(found.layers), want)


MAPPED = jax.vmap(grouped.task_product, (0, None, 0))


@pytest.mark.parametrize("by", [grouped._loop, grouped._ragged, MAPPED, jax.jit(MAPPED)])
@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (1, 2, 5)])
@pytest.mark.parametrize("size", [7, 8])  # pairs of inputs of one task and of two, or none
def test_grouped_products(by, num_tasks, shape, size):
    rng = np.random.default_rng(0)
    x, factor = rng.normal(size=(size, *shape)), rng.normal(size=(num_tasks, 5, 4))
    tasks = np.sort(rng.integers(0, num_tasks, size))
    found = by(jnp.asarray(x, jnp.float32), jnp.asarray(factor, jnp.float32), jnp.asarray(tasks))
    want = np.einsum("n...i,nio->n...o", x, factor[tasks])
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_grouped_product_of_what_is_not_mapped():
    rng = np.random.default_rng(0)
    x, factor = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((3, 5), (2, 5, 4)))
    tasks = jnp.array([0, 1, 1])
    want = [x @ factor[task] for task in tasks]
    found = jax.vmap(grouped.task_product, (None, None, 0))(x, factor, tasks)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    found = jax.vmap(grouped.task_product, (0, None, None))(x[None], factor, tasks[1])
    np.testing.assert_allclose(found[0], want[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="factor: got one for each input"):
        jax.vmap(grouped.task_product)(jnp.stack([x] * 3), factor[tasks][:, None], tasks)


@pytest.fixture(scope="module")
def vit():
    """A model, its state, a recoverer of small batches and eleven inputs."""
    model = MODELS["vit"]
    state = fitted(model)
    return model, state, recovery.Recoverer(model, state, max_batch=8), inputs_of(model, 11)


@pytest.mark.parametrize("mode", recovery.MODES)
@pytest.mark.parametrize(
    "task_ids",
    [[0] * 11, [3] * 11, [0] * 10 + [3], [3, 2, 1, 0] * 2 + [1, 1, 1], [1, 0] * 5 + [2]],
    ids=["all of the first", "all of the last", "one of another", "descending", "mixed"],
)
def test_mixtures(vit, mode, task_ids):
    model, state, recoverer, inputs = vit
    found = recoverer.features(inputs, np.array(task_ids), mode)
    assert_agree(found, by_group(model, state, inputs, task_ids))


@pytest.mark.parametrize("mode", recovery.MODES)
def test_order_and_company_change_nothing(vit, mode):
    _, _, recoverer, inputs = vit
    found = recoverer.features(inputs, MIXED, mode)
    order = np.random.default_rng(0).permutation(11)
    shuffled = recoverer.features({"image": inputs["image"][order]}, MIXED[order], mode)
    np.testing.assert_allclose(shuffled, found[order], rtol=1e-5, atol=1e-5)
    alone = recoverer.features({"image": inputs["image"][3:4]}, MIXED[3:4], mode)
    np.testing.assert_allclose(alone, found[3:4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", recovery.MODES)
def test_one_task_and_no_inputs(mode):
    model = MODELS["vit"]
    state, inputs = fitted(model, num_tasks=1), inputs_of(model, 3)
    recoverer = recovery.Recoverer(model, state)
    zeros = np.zeros(3, int)
    assert_agree(recoverer.features(inputs, zeros, mode), by_group(model, state, inputs, zeros))
    none = recoverer.features({"image": inputs["image"][:0]}, zeros[:0], mode)
    assert (none.shape, none.dtype) == ((0, 12), np.float32)


@pytest.mark.parametrize("mode", recovery.MODES)
@pytest.mark.parametrize("name", mostly_slow(["vit", "bert"], "vit"))
def test_bfloat16_loses_no_more_than_twice_what_recovered_parameters_lose(name, mode):
    exact = MODELS[name]
    low = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = type(exact)(dataclasses.replace(exact.config, **low))
    state, inputs = fitted(exact), inputs_of(model, 11)
    want = by_group(exact, state, inputs, MIXED)
    merged = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.merged)
    rounded = dataclasses.replace(state, merged=merged)
    lost = np.abs(by_group(model, rounded, inputs, MIXED) - want).max()
    found = recovery.Recoverer(model, rounded, max_batch=8).features(inputs, MIXED, mode)
    assert 0 < np.abs(found - want).max() <= 2 * lost
    assert lost < 0.1 * np.abs(want).max()


def test_factors_have_the_dtype_of_the_layers_output():
    config = dataclasses.replace(VISION, dtype=jnp.bfloat16)
    prepared = factored.prepare(models.ViT(config), fitted(MODELS["vit"]))
    assert {x.dtype for x in jax.tree.leaves(prepared.terms)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(prepared.by_task)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("mode", ["factored", "materialized"])
def test_images_are_decoded_batch_by_batch(vit, mode, monkeypatch):
    model, state, recoverer, _ = vit
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    read, before = [], []
    images = data.Images(lambda i: read.append(i) or pixels[i], np.arange(64), 8, "counted")
    name = "_factored" if mode == "factored" else "_plain"
    program = getattr(modes, name)
    monkeypatch.setattr(modes, name, lambda *given: before.append(len(read)) or program(*given))
    found = recoverer.features({"image": images}, np.ones(64, int), mode)
    assert len(read) == 64
    assert all(count <= 8 * (k + 3) for k, count in enumerate(before))  # this batch and two ahead
    assert_agree(found, by_group(model, state, {"image": pixels}, [1] * 64))
    read.clear()
    recoverer.plan({"image": images}, np.arange(64) % NUM_TASKS)
    assert not read


def test_another_mixture_compiles_nothing(vit, caplog):
    _, _, _, inputs = vit
    recoverer = recovery.Recoverer(*vit[:2], max_batch=8)
    mixtures = [[0] * 8, [3, 0, 0, 0, 0, 0, 0, 0], [0, 1, 2, 3] * 2, [1] * 4 + [2] * 4]
    eight = {"image": inputs["image"][:8]}
    recoverer.features(eight, np.array([0, 1, 1, 2, 2, 2, 2, 3]), "factored")
    recoverer.features(eight, np.array([0, 1, 1, 2, 2, 2, 2, 3]), "sample_wise")
    for size in (1, 2, 4, 8):
        recoverer.features({"image": inputs["image"][:size]}, np.zeros(size, int), "grouped")
    with jax.log_compiles():
        for mixture in mixtures:
            for mode in recovery.MODES:
                recoverer.features(eight, np.array(mixture), mode)
        recoverer.features({"image": inputs["image"][:5]}, np.arange(5) % 4, "factored")
        assert not [text for text in caplog.messages if text.startswith("Compiling")]
        jax.jit(lambda x: x * 5.25)(np.ones(7))
        assert [text for text in caplog.messages if text.startswith("Compiling")]


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_eight_devices_give_what_one_gives(name):
    model = MODELS[name]
    state, inputs = fitted(model), inputs_of(model, 16)
    ids = np.random.default_rng(1).integers(0, NUM_TASKS, 16)
    prepared = factored.prepare(model, state)
    run = jax.jit(lambda prepared, batch, ids: factored.apply(model, prepared, batch, ids).pooled)
    want = run(prepared, inputs, ids)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = jax.device_put((inputs, ids), rows)
    found = run(jax.device_put(prepared, whole), *spread)
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_texts_of_many_lengths_keep_their_order():
    model = models.Bert(dataclasses.replace(BERT, max_length=40))
    state = fitted(model, num_tasks=3)
    rng = np.random.default_rng(0)
    mask = (np.arange(40) < rng.permutation(np.arange(3, 36, 3))[:, None]).astype(np.int32)
    texts = {"input_ids": rng.integers(1, 30, mask.shape, np.int32), "attention_mask": mask}
    ids = np.arange(11) % 3
    want = by_group(model, state, texts, ids)
    recoverer = recovery.Recoverer(model, state, max_batch=4)
    for mode in ("factored", "materialized", "sample_wise"):
        assert_agree(recoverer.features(texts, ids, mode), want)


def tree_of(size):
    return {"x": np.zeros(size, np.int8)}


def test_the_least_recently_used_expert_is_forgotten():
    cache, made = ParamsCache(10), []

    def get(task, size=4):
        return cache.get(task, lambda: made.append(task) or tree_of(size))

    assert get(0) is get(0)
    get(1)
    get(0)
    get(2)  # 12 bytes: task 1 goes
    assert (cache.keys(), made) == ({0, 2}, [0, 1, 2])
    assert get(3, size=11)["x"].size == 11  # larger than the cache: made, and not kept
    assert cache.keys() == {0, 2}
    get(4, size=10)  # as large as the cache: all others go
    assert cache.keys() == {4}


def test_experts_are_kept_within_the_bytes(vit, monkeypatch):
    model, state, _, inputs = vit
    size = tree.param_bytes(state.merged)
    recovered = []
    recover = offsets.recover
    monkeypatch.setattr(
        offsets, "recover", lambda state, task: recovered.append(task) or recover(state, task)
    )
    two = recovery.Recoverer(model, state, max_batch=8, cache_bytes=2 * size)
    for _ in range(2):
        two.features(inputs, np.array([0, 1] * 5 + [0]), "materialized")
    assert recovered == [0, 1]
    two.features(inputs, np.array([2, 1] * 5 + [2]), "materialized")
    assert recovered == [0, 1, 2]  # 0 was the least recently used
    none = recovery.Recoverer(model, state, max_batch=8, cache_bytes=size - 1)
    recovered.clear()
    for _ in range(2):
        none.features(inputs, np.zeros(11, int), "materialized")
    assert recovered == [0, 0]
    recovered.clear()
    two.materialize()  # what it keeps is 1 and 2
    assert recovered == [0, 1]
    for task in (0, 1):
        assert two.plan(inputs, np.full(11, task)) == "materialized"


def test_threads_get_what_one_gets(vit):
    model, state, _, inputs = vit
    mixtures = [np.random.default_rng(seed).integers(0, NUM_TASKS, 11) for seed in range(8)]
    wanted = [by_group(model, state, inputs, ids) for ids in mixtures]
    recoverer = recovery.Recoverer(
        model, state, max_batch=8, cache_bytes=2 * tree.param_bytes(state.merged)
    )
    found = {}

    def work(index):
        mode = ("factored", "materialized")[index % 2]
        found[index] = recoverer.features(inputs, mixtures[index], mode)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, want in enumerate(wanted):
        assert_agree(found[index], want)


class Square(nn.Module):
    """One kernel (a, b) on as many tokens as there are."""

    out: int

    @nn.compact
    def __call__(self, batch):
        return nn.Dense(self.out, use_bias=False, name="dense")(batch["x"])

    def example_batch(self):
        return {"x": jnp.zeros((1, 1, 12))}


def test_costs_by_hand(monkeypatch):
    monkeypatch.setattr(planning, "_WORK_OF_A_BYTE", 0)
    rng = np.random.default_rng(0)
    generator = jnp.asarray(rng.normal(size=(3, 6, 2)), jnp.float32)
    product = Product(generator, jnp.asarray(rng.normal(size=(2, 12)), jnp.float32))
    merged = {"dense": {"kernel": jnp.zeros((12, 6))}}
    report = offsets.FitReport({}, {}, {}, {})
    state = offsets.OffsetState.baked(merged, {"dense/kernel": product}, report, 3, "flax")
    model = Square(6)
    prepared = factored.prepare(model, state)
    costs = planning.costs(model, prepared, {"x": jnp.zeros((1, 4, 12))})
    assert costs == planning.Costs(4 * 72, 4 * 2 * (12 + 6), 2 * 72)
    # ab / (a + b) = 4 tokens, which is one input of a task: the costs break even.
    assert costs.correction == costs.recovery


def test_plans_by_counts():
    costs = planning.Costs(forward=100.0, correction=10.0, recovery=500.0)

    def cheaper(counts, cached=()):
        return planning.is_factored_cheaper(counts, set(cached), 16, costs)

    assert cheaper({0: 4, 1: 4, 2: 8})  # 16 x 110 against 16 x 100 + 3 x 500
    assert not cheaper({0: 4, 1: 4, 2: 8}, cached=[0, 1, 2])  # against 16 x 100
    assert cheaper({0: 4, 1: 4, 2: 8}, cached=[0, 1])
    assert cheaper({0: 5, 1: 5, 2: 6}, cached=[0, 1, 2])  # against 24 x 100: groups are padded
    assert not cheaper({0: 64})  # 64 x 110 against 64 x 100 + 500
    assert cheaper({0: 48})


@pytest.mark.parametrize(
    ("count", "limit", "want"),
    [(0, 8, 1), (1, 8, 1), (2, 8, 2), (3, 8, 4), (8, 8, 8), (9, 8, 8), (5, 4, 4)],
)
def test_buckets(count, limit, want):
    assert planning.bucket(count, limit) == want


@pytest.mark.parametrize(("count", "want"), [(0, 0), (3, 4), (8, 8), (9, 9), (19, 20), (16, 16)])
def test_padded_sizes(count, want):
    assert planning.padded_size(count, 8) == want


def test_plans_of_a_model(vit):
    model, state, _, inputs = vit
    recoverer = recovery.Recoverer(model, state, max_batch=8)
    assert recoverer.plan(inputs, MIXED) == "factored"  # nothing is recovered yet
    recoverer.materialize()
    assert recoverer.plan(inputs, np.zeros(11, int)) == "materialized"
    poor = recovery.Recoverer(model, state, max_batch=8, cache_bytes=0)
    many = {"image": np.repeat(inputs["image"], 800, axis=0)}
    assert poor.plan(many, np.zeros(8800, int)) == "grouped"
    assert recovery.Recoverer(model, state).plan(many, np.ones(8800, int)) == "materialized"


def test_wrong_requests_are_told_at_once(vit):
    _, _, recoverer, inputs = vit
    with pytest.raises(ValueError) as error:
        recoverer.features(inputs, np.array([0.0, 4.0]), "fused")
    for text in ("mode: got 'fused'", "task_ids: got shape (2,)", "got dtype float64"):
        assert text in str(error.value)
    for ids in ([4] + [0] * 10, [-1] + [0] * 10):
        with pytest.raises(ValueError, match=r"task_ids: got .* expected 0 to 3"):
            recoverer.features(inputs, np.array(ids))
    with pytest.raises(ValueError, match="max_batch: got 6, expected a power of two"):
        recovery.Recoverer(*vit[:2], max_batch=6)
    with pytest.raises(ValueError, match="cache_bytes: got -1"):
        recovery.Recoverer(*vit[:2], cache_bytes=-1)


def test_a_scanned_model_is_refused(vit):
    model, state = vit[:2]
    stacked = dataclasses.replace(state, merged=stacking.stack_blocks(dict(state.merged)))
    scanned = models.ViT(dataclasses.replace(model.config, scan=True))
    with pytest.raises(ValueError, match=r"stacked for scan=True, such as 'blocks/attention"):
        factored.prepare(scanned, stacked)


def test_plans_of_a_scanned_model(vit):
    _, _, recoverer, inputs = vit
    assert recoverer.is_factorable
    model = models.ViT(dataclasses.replace(VISION, scan=True))
    state = fitted(model)
    want = by_group(model, state, inputs, MIXED)
    for cache_bytes, plan in ((2**30, "materialized"), (0, "grouped")):
        scanned = recovery.Recoverer(model, state, max_batch=8, cache_bytes=cache_bytes)
        assert not scanned.is_factorable
        assert scanned.plan(inputs, MIXED) == plan
        assert_agree(scanned.features(inputs, MIXED), want)
