import jax
import numpy as np
import pytest
import references
import references_offsets as wanted
from expert_sets import MODEL_IDS, MODELS, assert_close, expert_set

import retex_jax as rtx
from retex_jax.offsets.forms import Tied
from retex_jax.offsets.serialization import from_tensors, to_tensors

RETEX = rtx.METHODS["retex"]


def _fit(pretrained, experts, layout="flax", **options):
    options = {"form": "shape_shared", "rank": 4, **options}
    return RETEX.fit(expert_set(pretrained, experts, layout=layout), **options)


def _shapes(base):
    """Leaves by shape, as matrices where they are; both layouts alike."""
    shapes = {}
    for name, leaf in base.items():
        if references.is_float(leaf):
            is_matrix = name in references.FLAX_MATRICES
            shape = (
                references.as_matrix(leaf, references.FLAX_MATRICES[name]).shape
                if is_matrix
                else leaf.shape
            )
            shapes.setdefault(shape, []).append(name)
    return shapes


def _repeated(num_tasks, seed=0):
    """Two blocks of equal shapes, a square kernel, and one leaf of a shape of its own."""
    rng = np.random.default_rng(seed)
    shapes = {
        "block_0/kernel": (8, 6), "block_0/bias": (6,), "block_0/scale": (), "square/kernel": (6, 6),
        "block_1/kernel": (8, 6), "block_1/bias": (6,), "block_1/scale": (), "head/embedding": (6, 8),
    }  # fmt: skip
    pretrained = {name: np.array(rng.normal(size=shape), "f4") for name, shape in shapes.items()}
    experts = [
        {k: np.array(v + 0.3 * rng.normal(size=v.shape), "f4") for k, v in pretrained.items()}
        for _ in range(num_tasks)
    ]
    return pretrained, experts


@pytest.mark.parametrize("model", MODELS, ids=MODEL_IDS)
def test_every_shape_has_its_optimum(model):
    pretrained, experts = model
    state = _fit(pretrained, experts, base="task_arithmetic", base_options={"scaling": 0.1})
    wanted.check_state(state, RETEX.recover, experts, references.FLAX_MATRICES)
    wanted.check_mixture(state, RETEX.mix, RETEX.recover, len(experts))
    base = references.flat(state.merged)
    total = 0.0
    for shape, names in _shapes(base).items():
        stacks = [
            wanted.offsets_of(base, experts, name, references.FLAX_MATRICES) for name in names
        ]
        rank = references.leaf_rank(shape, 4) if len(shape) == 2 else None
        best, least = wanted.shape_shared(stacks, rank)
        total += least
        residual = sum(state.report.residuals[name] for name in names)
        optimum = sum(state.report.optima[name] for name in names)
        assert optimum == pytest.approx(least, rel=1e-5, abs=1e-9)
        assert residual == pytest.approx(least, rel=1e-4, abs=1e-9)
        for name in names:
            for task in range(len(experts)):
                found = wanted.stored_offset(state, name, np.eye(len(experts))[task])
                np.testing.assert_allclose(found, best[task], rtol=1e-4, atol=1e-5)
    assert 1 - 1e-5 <= state.report.ratio <= 1.0001
    assert state.report.optimum == pytest.approx(total, rel=1e-5)
    assert len(state.offsets) > len(_shapes(base)), "no two leaves of a shape"


@pytest.mark.parametrize("orientation", ["right", "left", "auto"])
def test_a_shape_is_stored_once(orientation):
    pretrained, experts = _repeated(3)
    state = _fit(pretrained, experts, rank=2, orientation=orientation)
    matrices = {name: ((1, 0), 1) for name in pretrained if name.endswith("kernel")}
    wanted.check_state(state, RETEX.recover, experts, matrices | {"head/embedding": ((0, 1), 1)})
    ties = {name: form.owner for name, form in state.offsets.items() if isinstance(form, Tied)}
    # (6, 8) as matrices: both kernels, and the embedding table.
    assert ties == {
        "block_1/kernel": "block_0/kernel",
        "head/embedding": "block_0/kernel",
        "block_1/bias": "block_0/bias",
        "block_1/scale": "block_0/scale",
    }
    tall, wide = (8, 6) if orientation == "left" else (6, 8)
    floats = 3 * 3 + 3 * tall * 2 + 2 * wide + 3 * 6 * 2 + 2 * 6 + (3 * 6 + 1) + (3 + 1)
    assert RETEX.extra_bytes(state) == 4 * floats
    assert len(jax.tree.leaves(state.offsets)) == 8
    assert state.form("block_1/kernel") is state.offsets["block_0/kernel"]
    recovered = references.flat(RETEX.recover(state, 1))
    merged = references.flat(state.merged)
    for name, owner in ties.items():
        if "head" not in name:
            np.testing.assert_allclose(
                recovered[name] - merged[name], recovered[owner] - merged[owner], atol=1e-6
            )


def test_shapes_that_occur_once_are_retex():
    pretrained, experts = _repeated(3)
    kept = ("square/kernel", "block_0/kernel", "block_0/bias")
    pretrained = {name: pretrained[name] for name in kept}
    experts = [{name: expert[name] for name in kept} for expert in experts]
    assert_close(
        RETEX.recover(_fit(pretrained, experts, rank=2), 2),
        references.flat(RETEX.recover(RETEX.fit(expert_set(pretrained, experts), rank=2), 2)),
    )


def test_equal_leaves_lose_nothing_by_sharing():
    pretrained, experts = _repeated(3)
    models = [
        {name: model[name.replace("_1", "_0")] for name in model if "block" in name}
        for model in (pretrained, *experts)
    ]
    alone = [{name: m[name] for name in m if "_0" in name} for m in models]
    state = _fit(models[0], models[1:], rank=2)
    single = RETEX.fit(expert_set(alone[0], alone[1:]), rank=2)
    assert state.report.residual == pytest.approx(2 * single.report.residual, rel=1e-5)
    assert state.report.optimum == pytest.approx(2 * single.report.optimum, rel=1e-5)
    assert RETEX.extra_bytes(state) == RETEX.extra_bytes(single)


def test_torch_layout_shares_alike():
    pretrained, experts = _repeated(2)
    torch = [
        {name: leaf.T if name.endswith("kernel") else leaf for name, leaf in model.items()}
        for model in (pretrained, *experts)
    ]
    one = _fit(pretrained, experts, rank=2)
    two = _fit(torch[0], torch[1:], "torch", rank=2)
    for task in range(2):
        found = references.flat(RETEX.recover(two, task))
        found = {name: leaf.T if name.endswith("kernel") else leaf for name, leaf in found.items()}
        assert_close(found, references.flat(RETEX.recover(one, task)))


def test_tensors_and_back():
    state = _fit(*_repeated(3), rank=2)
    tensors, facts = to_tensors(state.offsets)
    assert not any(name.startswith("block_1") for name in tensors)
    assert facts["block_1/kernel"] == {"form": "tied", "owner": "block_0/kernel"}
    again = from_tensors({key: np.asarray(leaf) for key, leaf in tensors.items()}, facts)
    assert jax.tree.structure(again) == jax.tree.structure(state.offsets)
    for one, two in zip(jax.tree.leaves(again), jax.tree.leaves(state.offsets), strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype == np.float32


@pytest.mark.parametrize("owner", ["missing", "block_1/bias", "block_1/kernel"])
def test_owners_must_be_there(owner):
    tensors, facts = to_tensors(_fit(*_repeated(2), rank=2).offsets)
    facts["block_1/kernel"]["owner"] = owner
    with pytest.raises(ValueError, match=f"block_1/kernel: its owner '{owner}' is missing, or is"):
        from_tensors(tensors, facts)


def test_sharded_equals_one_device(place_on_8_devices):
    pretrained, experts = _repeated(2)
    found = _fit(place_on_8_devices(pretrained), list(map(place_on_8_devices, experts)), rank=2)
    want = _fit(pretrained, experts, rank=2)
    assert found.report.residual == pytest.approx(want.report.residual, rel=1e-6)
    for task in range(2):
        assert_close(RETEX.recover(found, task), references.flat(RETEX.recover(want, task)))


def test_progress_counts_shapes():
    calls = []
    _fit(*_repeated(2), rank=2, progress=lambda *call: calls.append(call))
    assert calls == [(done, 4) for done in range(1, 5)]
