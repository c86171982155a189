"""The paper's forms and objectives, learned by Adam, and how the options of `fit` compose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import references_offsets as wanted
from expert_sets import assert_close, expert_set

import retex_jax as rtx
from retex_jax import tree
from retex_jax.offsets import adam, generator, learned, memory
from retex_jax.offsets.forms import Affine, Elementwise, Factorized, Product, Separate, Tied
from retex_jax.offsets.generator import Objective
from retex_jax.offsets.state import plan_leaves

RETEX = rtx.METHODS["retex"]
FORMS = ("product", "factorized", "shape_shared", "affine")
FAST = {
    "solver": "adam",
    "rank": 3,
    "learning_rate": 1e-2,
    "steps": 40,
    "warmup_steps": 10,
    "chunk_steps": 20,
    "checkpoint_every": 20,
}
MATRICES = {
    "dense/kernel": ((1, 0), 1),
    "second/kernel": ((1, 0), 1),
    "token/embedding": ((0, 1), 1),
}


def _model(num_tasks=3, seed=0):
    """Two kernels and two biases of a shape, a scalar, a table, and a buffer."""
    rng = np.random.default_rng(seed)
    shapes = {"dense/bias": (5,), "dense/kernel": (6, 5), "scale": (), "second/bias": (5,),
              "second/kernel": (6, 5), "token/embedding": (7, 4)}  # fmt: skip
    pretrained = {name: np.array(rng.normal(size=shape), "f4") for name, shape in shapes.items()}
    experts = [
        {k: np.array(v + 0.3 * rng.normal(size=v.shape), "f4") for k, v in pretrained.items()}
        for _ in range(num_tasks)
    ]
    buffers = {"steps": np.arange(3, dtype=np.int32)}
    return {**pretrained, **buffers}, [{**expert, **buffers} for expert in experts]


def _fit(model=None, form="product", **options):
    if form == "factorized":
        options = {"task_rank": 2, **options}
    options = {"form": form, "key": jax.random.key(0), **FAST, **options}
    return RETEX.fit(expert_set(*(model or _model())), **options)


@functools.cache
def _long_fit(form, objective):
    long = {"steps": 3000, "warmup_steps": 100, "chunk_steps": 1000, "checkpoint_every": 1000}
    return _fit(_model(), form, objective=objective, **long)


def _problem(experts, merged, form, loss, orientation="right"):
    plans = plan_leaves(experts.leaves, "flax", 3, orientation=orientation)
    groups = learned.group_leaves(experts, plans, form)
    base = tree.flatten(merged)
    return (
        plans,
        groups,
        learned.make_problem(experts, base, plans, groups, form, loss, lambda _, leaf: leaf),
    )


def _drawn(plans, groups, problem, form, d_emb=2):
    """Parameters that are drawn, S and all."""
    ranks = {
        index: plans[group[0]].rank if group[0] in plans else None
        for index, group in enumerate(groups)
    }
    task_rank = 2 if form == "factorized" else None
    params = generator.init_params(
        jax.random.key(3), groups, problem.targets, ranks, d_emb, form=form, task_rank=task_rank
    )
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(5)
    drawn = [jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, drawn)


@pytest.mark.parametrize("loss", ["l2", "cosine", "cosine_l2"])
@pytest.mark.parametrize("form", FORMS)
def test_the_objective_is_its_definition(form, loss):
    pretrained, experts = _model()
    made = expert_set(pretrained, experts)
    merged = rtx.METHODS["task_arithmetic"].fit(made, scaling=0.2)
    plans, groups, problem = _problem(made, merged, form, loss, "auto")
    params = _drawn(plans, groups, problem, form)
    state = learned.to_state(
        made, merged, plans, groups, problem, params, form, 2 if form == "factorized" else None
    )
    base = references.flat(merged)
    found = [
        {
            name: base[name].astype(np.float64)
            + (
                references.as_leaf(
                    wanted.stored_offset(state, name, embedding), MATRICES[name], base[name].shape
                )
                if name in MATRICES
                else wanted.stored_offset(state, name, embedding)
            )
            for name in state.offsets
        }
        for embedding in np.asarray(state.task_embeddings)
    ]
    objective = jax.jit(generator.objective_fn, static_argnames=("objective", "form"))
    for tasks in (None, [2], [0, 2]):
        chosen = range(3) if tasks is None else tasks
        want = wanted.objective(
            [found[task] for task in chosen], [experts[task] for task in chosen], pretrained, loss, 0.3
        )  # fmt: skip
        value = objective(
            params, problem, None if tasks is None else jnp.array(tasks),
            objective=Objective(loss, 0.3), form=form,
        )  # fmt: skip
        assert float(value) == pytest.approx(want, rel=1e-5, abs=1e-5)
    # The report is of what is stored, too.
    residual = wanted.objective(found, experts, pretrained, "l2")
    assert state.report.residual == pytest.approx(residual, rel=1e-5)


def test_the_objective_forms_no_offset():
    made = expert_set(*_model())
    merged = rtx.METHODS["weight_average"].fit(made)
    for form in FORMS:
        plans, groups, problem = _problem(made, merged, form, "cosine_l2")
        kept = {index: x for index, x in problem.targets.items() if x.ndim == 4}
        params = _drawn(plans, groups, problem, form)
        problem = problem._replace(targets=kept)
        text = str(
            jax.make_jaxpr(
                lambda p, q, f=form: generator.objective_fn(p, q, objective=Objective(), form=f)
            )(params, problem)
        )
        sizes = {leaf.shape for leaf in kept.values()}
        for size in sizes:
            shape = ",".join(map(str, size))
            products = [
                line for line in text.splitlines()
                if "dot_general[" in line and f"f32[{shape}] = " in line
            ]  # fmt: skip
            assert not products, products


def test_cosine_has_no_gradient_of_nothing():
    """A base that is the pretrained model, and an expert that is: no direction, no NaN."""
    pretrained, experts = _model()
    experts[1] = pretrained
    state = _fit((pretrained, experts), objective="cosine", base=references.nested(pretrained))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.offsets))


@pytest.mark.parametrize("form", FORMS)
def test_cosine_turns_the_task_vectors(form):
    pretrained, experts = _model()
    states = {loss: _long_fit(form, loss) for loss in ("l2", "cosine", "cosine_l2")}
    cosines = {}
    for loss, state in states.items():
        found = [references.flat(RETEX.recover(state, task)) for task in range(3)]
        cosines[loss] = wanted.objective(found, experts, pretrained, "cosine")
    start = references.flat(states["l2"].merged)
    assert cosines["cosine"] < 0.5 * wanted.objective([start] * 3, experts, pretrained, "cosine")
    # Directions as good as the squared error's; lengths are free, so that errors are larger.
    assert cosines["cosine"] <= 1.05 * cosines["l2"] + 1e-3
    residual = {loss: state.report.residual for loss, state in states.items()}
    assert residual["cosine"] > residual["l2"]
    assert residual["cosine_l2"] <= 1.1 * residual["l2"] + 1e-4


@pytest.mark.parametrize(
    ("form", "orientation"),
    [*((form, "auto") for form in FORMS), ("factorized", "left"), ("affine", "left")],
)
def test_every_form_is_learned_and_stored(form, orientation):
    pretrained, experts = _model()
    state = _fit((pretrained, experts), form, orientation=orientation)
    wanted.check_state(state, RETEX.recover, experts, MATRICES)
    wanted.check_mixture(state, RETEX.mix, RETEX.recover, 3)
    np.testing.assert_array_equal(state.task_embeddings, np.eye(3))
    kinds = {
        "product": Product,
        "factorized": Factorized,
        "shape_shared": Product,
        "affine": Affine,
    }
    assert isinstance(state.offsets["dense/kernel"], kinds[form])
    tied = isinstance(state.offsets["second/kernel"], Tied)
    assert tied == isinstance(state.offsets["second/bias"], Tied) == (form == "shape_shared")
    # The table is (7, 4) as a matrix: at the paper's rank of 3 it has a factor to factorise.
    assert isinstance(state.offsets["token/embedding"], kinds[form])


@pytest.mark.parametrize("form", FORMS)
def test_adam_reaches_what_the_exact_solver_finds(form):
    pretrained, experts = _model()
    state = _long_fit(form, "l2")
    options = {"form": form, "rank": 3, "task_rank": 2 if form == "factorized" else None}
    exact = RETEX.fit(expert_set(pretrained, experts), **options)
    if form in ("product", "shape_shared"):
        assert state.report.optimum == pytest.approx(exact.report.optimum, rel=1e-5)
        assert 1 - 1e-5 <= state.report.ratio <= 1.01
    # Alternating may end at another stationary point than Adam does.
    bound = 1.02 if form in ("product", "shape_shared") else 1.1
    assert state.report.residual <= bound * exact.report.residual + 1e-6
    if form == "factorized":
        assert state.report.optimum == pytest.approx(exact.report.optimum, rel=1e-5)
        assert state.report.ratio >= 1
    if form == "affine":
        assert np.isnan(state.report.ratio)
        assert state.report.gammas["dense/kernel"].shape == (3, 3)


def test_gammas_are_recorded_and_stored():
    pretrained, experts = _model(6)
    for d_emb in (None, 2):
        state = _fit((pretrained, experts), "affine", d_emb=d_emb)
        assert set(state.report.gammas) == set(MATRICES)
        for name, gammas in state.report.gammas.items():
            assert gammas.shape == (2, 6)
            found = 1 + np.asarray(state.task_embeddings) @ np.asarray(state.offsets[name].scales)
            np.testing.assert_allclose(gammas[-1], found, rtol=1e-4, atol=1e-5)
            assert np.abs(gammas[0] - gammas[1]).max() > 1e-3, "they are learned"


@pytest.mark.parametrize("form", FORMS)
def test_generator_form_equals_the_baked_form(form):
    """Few embeddings: stored as a generator, and the same offsets as when every task's are written out."""
    pretrained, experts = _model(6)
    state = _fit((pretrained, experts), form, d_emb=2)
    wanted.check_state(state, RETEX.recover, experts, MATRICES)
    wanted.check_mixture(state, RETEX.mix, RETEX.recover, 6)
    entries = 6 if form == "factorized" else 3
    assert state.task_embeddings.shape == (6, entries)
    embeddings = np.asarray(state.task_embeddings)
    if form == "factorized":
        np.testing.assert_array_equal(embeddings, np.eye(6))
        return
    baked = {}
    for name, leaf in state.offsets.items():
        if isinstance(leaf, Tied):
            baked[name] = leaf
            continue
        parts = dict(vars(leaf))
        for part in ("generator", "scales"):
            if part in parts:
                parts[part] = jnp.asarray(np.tensordot(embeddings, np.asarray(parts[part]), 1))
        baked[name] = type(leaf)(**parts)
    twin = rtx.offsets.OffsetState(
        state.merged, jnp.eye(6, dtype=jnp.float32), baked, state.report, "flax"
    )
    for task in range(6):
        assert_close(RETEX.recover(twin, task), references.flat(RETEX.recover(state, task)))


@pytest.mark.parametrize("form", ["factorized", "affine"])
def test_one_task_a_step_and_twice_the_same(form):
    options = {"tasks_per_step": "one", "objective": "cosine_l2"}
    one, two = (_fit(None, form, **options) for _ in range(2))
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(first, second)
    other = _fit(None, form, key=jax.random.key(1), **options)
    assert one.report.residual != other.report.residual


def test_products_are_at_the_highest_precision():
    made = expert_set(*_model())
    merged = rtx.METHODS["weight_average"].fit(made)
    for form in FORMS:
        plans, groups, problem = _problem(made, merged, form, "cosine")
        params = _drawn(plans, groups, problem, form)
        optimizer = adam.make_optimizer(1e-2, 1, 2)
        state = adam.TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
        text = str(
            jax.make_jaxpr(adam.run_steps, static_argnums=(0, 1, 2, 3, 4, 5))(
                optimizer,
                "all",
                Objective("cosine"),
                form,
                None,
                1,
                state,
                problem,
                jax.random.key(0),
            )
        )
        products = text.count("dot_general[")
        assert products >= 10
        assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_memory_of_both_forms():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype("f4")

    offsets = {
        "a": Elementwise(draw(4, 5), draw()),
        "b": Product(draw(4, 6, 2), draw(2, 3)),
        "c": Factorized(draw(4, 6, 2), draw(4, 2, 3), draw(3, 7)),
        "d": Affine(draw(4, 6, 2), draw(2, 3), draw(4), draw(6, 3)),
        "e": Tied("b"),
    }
    generated = 5 + 12 + (12 + 6) + (12 + 1)
    shared = 1 + 6 + 21 + (6 + 18)
    found = memory.form_bytes(offsets, num_tasks=4, d_emb=9)
    assert found == (4 * (4 * 9 + 10 * generated + shared), 4 * (4 * generated + shared))
    # Whatever number of entries is stored.
    fewer = {**offsets, "b": Product(draw(2, 6, 2), draw(2, 3))}
    assert memory.form_bytes(fewer, 4, 9) == found
    models = memory.normalized_memory(offsets, 1000, 4, 9)
    assert models == (1 + found.generator / 1000, 1 + found.baked / 1000)
    with pytest.raises(ValueError, match="f: got Separate, products of single tasks"):
        memory.form_bytes({"f": Separate(draw(2, 3), draw(2, 4), (1, 1))}, 2, 1)


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_that_of_the_states(form):
    state = _fit(None, form)
    found = memory.form_bytes(state.offsets, 3, 5)
    assert found.baked == RETEX.extra_bytes(state) - 4 * 3 * 3  # but for the identity
    model_bytes = tree.param_bytes(state.merged)
    models = memory.normalized_memory(state.offsets, model_bytes, 3, 5)
    assert models.generator == 1 + found.generator / model_bytes
    few = _fit(_model(6), form, d_emb=2)
    if form != "factorized":  # which is stored baked
        found = memory.form_bytes(few.offsets, 6, 2)
        assert found.generator == RETEX.extra_bytes(few) - 4 * 6  # but for the constant's column


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "l1"}, "objective: got 'l1'"),
        ({"objective": "cosine_l2", "l2_weight": 0.0}, "l2_weight: got 0.0"),
        ({"l2_weight": float("nan")}, "l2_weight: got nan"),
        ({"form": "factorized", "task_rank": 3}, "task_rank: got 3, expected an integer from 1 to 2"),
        ({"form": "affine", "budget": 0.2, "rank": None}, "(?s)takes no budget.*budget: got 0.2 with"),
        ({"form": "shape_shared", "task_rank": 1}, "task_rank: got 1 with form = 'shape_shared'"),
        ({"sweeps": 3}, "sweeps: no such option"),
        ({"solver": "exact", "objective": "cosine"}, "no such option"),
    ],
)  # fmt: skip
def test_bad_options(options, message):
    if options.get("solver") == "exact":
        options = {"rank": 3, **options}
        with pytest.raises(ValueError, match=message):
            RETEX.fit(expert_set(*_model()), **options)
        return
    with pytest.raises(ValueError, match=message):
        _fit(**{"form": "product", **options})


def test_settings_of_forms_are_checked_without_data():
    with pytest.raises(ValueError, match=r"form: got 'x'.*objective: got 'y'.*l2_weight: got -1"):
        adam.check_settings(form="x", objective="y", l2_weight=-1)
    for options in (
        {"form": "factorized"},
        {"task_rank": 2},
        {"form": "factorized", "task_rank": 0},
    ):
        with pytest.raises(ValueError, match="task_rank: got"):
            adam.check_settings(**options)


def test_the_cosine_needs_the_pretrained_model():
    _, experts = _model()
    made = rtx.ExpertSet.from_trees(None, list(map(references.nested, experts)))
    with pytest.raises(ValueError, match="pretrained: got None"):
        RETEX.fit(made, **FAST, objective="cosine")
    assert RETEX.fit(made, **FAST).num_tasks == 3


def test_sharded_equals_one_device(place_on_8_devices):
    rng = np.random.default_rng(0)
    pretrained = {"a/kernel": rng.normal(size=(16, 8)), "b/bias": rng.normal(size=8)}
    pretrained = {name: leaf.astype(np.float32) for name, leaf in pretrained.items()}
    experts = [
        {k: (v + 0.3 * rng.normal(size=v.shape)).astype("f4") for k, v in pretrained.items()}
        for _ in range(3)
    ]
    sharded = (place_on_8_devices(pretrained), list(map(place_on_8_devices, experts)))
    found = _fit(sharded, "affine", objective="cosine_l2")
    want = _fit((pretrained, experts), "affine", objective="cosine_l2")
    assert found.report.residual == pytest.approx(want.report.residual, rel=1e-4)
