"""The closed form on meshes, against that of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from expert_sets import assert_close, expert_set

import retex_jax as rtx
from retex_jax import sharding, tree
from retex_jax.offsets import exact, factor_file, sharded
from retex_jax.offsets.state import plan_leaves

NUM_TASKS = 8
FLOAT32 = np.dtype(np.float32)
MESHES = [{"task": 1}, {"task": 8}, {"task": 4, "layer": 2}]


def mesh_of(sizes):
    devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))])
    return jax.sharding.Mesh(devices.reshape(*sizes.values()), tuple(sizes))


@pytest.fixture(scope="module")
def experts():
    return expert_set(*references.flax_model(NUM_TASKS))


def assert_same(found, want):
    for task in (0, 3, NUM_TASKS - 1):
        one = references.flat(jax.device_get(rtx.offsets.recover(found, task)))
        assert_close(one, references.flat(rtx.offsets.recover(want, task)), 1e-5, 1e-6)
    assert_same_report(found, want)


def assert_same_report(found, want):
    for part in ("residuals", "optima", "energies"):
        figures, wanted = getattr(found.report, part), getattr(want.report, part)
        assert figures.keys() == wanted.keys()
        for name, figure in figures.items():
            scale = want.report.energies[name]
            assert figure == pytest.approx(wanted[name], rel=1e-6, abs=1e-9 * scale), (part, name)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_what_one_device_gives(experts, sizes, tmp_path):
    options = {"rank": 3, "orientation": "auto"}
    want = rtx.offsets.fit(experts, **options, precision="float64")
    found = rtx.offsets.fit_sharded(experts, mesh_of(sizes), **options)
    assert_same(found, want)
    factors = [form.generator for form in found.offsets.values()]
    assert all(len(x.sharding.device_set) == int(np.prod(list(sizes.values()))) for x in factors)
    assert all(x.addressable_shards[0].data.shape[0] == NUM_TASKS // sizes["task"] for x in factors)
    whole = sharded.gather(found)
    factor_file.save(tmp_path / "offsets.safetensors", whole)
    assert_same(factor_file.load(tmp_path / "offsets.safetensors"), want)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(whole.offsets))
    assert_same(whole, want)


def test_another_base_and_single_precision(experts):
    base = rtx.METHODS["ties"].fit(experts)
    want = rtx.offsets.fit(experts, rank=2, base=base)
    found = rtx.offsets.fit_sharded(
        experts, mesh_of({"task": 2}), rank=2, base=base, precision="float32"
    )
    assert np.isnan(found.report.optimum)
    assert found.report.residual == pytest.approx(want.report.residual, rel=1e-4)
    for name, leaf in references.flat(base).items():
        np.testing.assert_array_equal(references.flat(found.merged)[name], leaf)


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_offsets_make_up_for_the_rounding_of_the_merged_model(dtype, is_given):
    rng = np.random.default_rng(0)
    start = {"a/kernel": rng.normal(size=(32, 32)), "a/bias": rng.normal(size=32)}
    ulp = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    models = [
        {name: x + ulp * rng.normal(size=x.shape) * (task > 0) for name, x in start.items()}
        for task in range(5)
    ]
    models = [{name: x.astype(jnp.dtype(dtype)) for name, x in own.items()} for own in models]
    models = [model | {"b/kernel": rng.normal(size=(32, 32)).astype("f4")} for model in models]
    experts = expert_set(models[0], models[1:])
    base = "weight_average"
    if is_given:
        base = tree.unflatten(
            {name: np.mean([x[name].astype("f4") for x in models], 0) for name in models[0]}
        )
    found = rtx.offsets.fit_sharded(experts, mesh_of({"task": 2}), rank=8, base=base)
    rounded = found.merged if is_given else base
    want = rtx.offsets.fit(experts, rank=8, base=rounded, precision="float64")
    assert_same_report(found, want)
    for task, model in enumerate(models[1:]):
        recovered = references.flat(rtx.offsets.recover(found, task))["a/bias"]
        np.testing.assert_array_equal(recovered, model["a/bias"])


def test_the_gram_matrix_and_the_average_alone_cross_the_task_axis():
    """The collectives of the compiled program: sums of [b, b], of the leaf, and of three numbers."""
    rows, columns = 24, 16
    leaves = {"a/kernel": jax.ShapeDtypeStruct((columns, rows), jnp.float32)}
    plan = plan_leaves(leaves, "flax", 4, "paper", "right")["a/kernel"]
    mesh = mesh_of({"task": 8})
    with jax.enable_x64(True):
        program = sharded.program(mesh, plan, NUM_TASKS, "float64", False, FLOAT32)
        there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "task"))
        stack = jax.ShapeDtypeStruct((1, NUM_TASKS, columns, rows), jnp.float32, sharding=there)
        text = program.lower(stack).compile().as_text()
    kinds = r"(all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"
    assert not re.search(rf" {kinds}(-start)?\(", text)
    sums = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    entries = sorted(
        int(np.prod([int(n) for n in shape.split(",") if n]))
        for each in sums
        for shape in re.findall(r"f\d+\[([\d,]*)\]", each)
    )
    assert entries == [1, 1, columns * columns, columns * rows]


def test_each_of_eight_devices_keeps_its_share_of_the_state():
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (16, 24), "a/bias": (24,), "b/embedding": (40, 16)}
    models = [
        {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
        for _ in range(NUM_TASKS + 1)
    ]
    experts = expert_set(models[0], models[1:])
    held = []
    for sizes in ({"task": 1}, {"task": 8}, {"task": 4, "layer": 2}):
        state = rtx.offsets.fit_sharded(experts, mesh_of(sizes), rank=8)
        held.append(sharding.device_bytes((state.merged, state.offsets)))
    assert held[0] == tree.param_bytes((state.merged, state.offsets))
    assert max(held[1:]) <= 1.15 / 8 * held[0]


def test_each_of_eight_devices_computes_with_its_share_of_many_experts():
    """By the analysis of the compiled program: arguments, results and scratch memory."""
    leaves = {"a/kernel": jax.ShapeDtypeStruct((32, 32), jnp.float32)}
    plan = plan_leaves(leaves, "flax", 8)["a/kernel"]
    held = []
    for count in (1, 8):
        mesh = mesh_of({"task": count})
        there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "task"))
        stack = jax.ShapeDtypeStruct((1, 512, 32, 32), jnp.float32, sharding=there)
        with jax.enable_x64(True):
            program = sharded.program(mesh, plan, 512, "float64", False, FLOAT32)
            found = program.lower(stack).compile().memory_analysis()
        held.append(
            found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        )
    assert held[1] <= 1.15 / 8 * held[0]


def test_only_the_own_experts_are_read(experts, monkeypatch):
    asked = []
    read = rtx.ExpertSet.expert
    monkeypatch.setattr(
        rtx.ExpertSet,
        "expert",
        lambda self, name, task: asked.append((name, task)) or read(self, name, task),
    )
    rtx.offsets.fit_sharded(experts, mesh_of({"task": 4}), rank=2)
    assert len(asked) == len(set(asked)) == NUM_TASKS * len(experts.float_leaves)


def test_wrong_meshes_are_told_at_once(experts, monkeypatch):
    with pytest.raises(ValueError, match=r"mesh: got axes \{'x': 8\}, expected 'task'"):
        rtx.offsets.fit_sharded(experts, mesh_of({"x": 8}), rank=2)
    monkeypatch.setattr(sharded, "MAX_GRAM", 8)
    with pytest.raises(ValueError) as error:
        rtx.offsets.fit_sharded(experts, mesh_of({"task": 3}), rank=2, base="ties")
    for text in (
        "3 devices along 'task', expected a divisor of the 8",
        "sides above 8",
        "base: got 'ties'",
    ):
        assert text in str(error.value)
    assert exact.MAX_GRAM > 8
