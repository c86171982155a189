"""Leaves of many experts that are solved a few tasks at a time, against the same in one stack."""

import weakref
from dataclasses import replace

import jax
import numpy as np
import pytest
import references
from expert_sets import expert_set

import retex_jax as rtx
from retex_jax import tree
from retex_jax.experts import ExpertSet
from retex_jax.offsets import certified, differences, exact, factor_file, streamed
from retex_jax.offsets.blocks import fold_rows
from retex_jax.offsets.coding import code, concatenate, dense
from retex_jax.offsets.state import plan_leaves

NUM_TASKS = 19
_TINY = 1e-2  # of leaves so small, float32 certifies no more
FIT = rtx.METHODS["retex"].fit


@pytest.fixture(scope="module")
def experts():
    return expert_set(*references.few_leaves(NUM_TASKS))


def assert_close(found, want, atol=1e-6):
    for name, leaf in references.flat(want).items():
        np.testing.assert_allclose(references.flat(found)[name], leaf, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3, "orientation": "left"},
        {"rank": 2, "bits": 3, "task_weights": "energy"},
        {"budget": 0.3, "task_weights": tuple(range(1, NUM_TASKS + 1))},
    ],
    ids=str,
)
def test_a_few_tasks_at_a_time_give_what_all_give(experts, options, tmp_path):
    want = FIT(experts, **options)
    path = tmp_path / "offsets.safetensors"
    found = FIT(experts, **options, stack_bytes=1, file=path)
    is_coded = "bits" in options  # then a factor's last digit may decide on a code
    for task in (0, 7, 8, NUM_TASKS - 1):
        if not is_coded:
            assert_close(rtx.offsets.recover(found, task), rtx.offsets.recover(want, task))
    for part in ("residuals", "optima", "energies"):
        figures, wanted = getattr(found.report, part), getattr(want.report, part)
        assert figures.keys() == wanted.keys()
        for name, figure in figures.items():
            within = 1e-2 if is_coded and part == "residuals" else 1e-5
            assert figure == pytest.approx(wanted[name], rel=within, abs=1e-9), (part, name)
    loaded = factor_file.load(path)
    in_memory = FIT(experts, **options, stack_bytes=1)
    for name, form in in_memory.offsets.items():
        for other in (found.offsets[name], loaded.offsets[name]):
            for one, same in zip(jax.tree.leaves(form), jax.tree.leaves(other), strict=True):
                np.testing.assert_array_equal(one, same)


def test_no_more_than_a_few_tasks_are_read_at_once(experts, monkeypatch):
    asked = []
    read = ExpertSet.stacked

    def spy(self, name, part=None):
        asked.append((name, self.num_tasks))
        return read(self, name, part)

    base = rtx.METHODS["weight_average"].fit(experts)
    monkeypatch.setattr(ExpertSet, "stacked", spy)
    FIT(experts, rank=2, base=base, stack_bytes=1)
    counts = {name: {n for other, n in asked if other == name} for name, _ in asked}
    matrices = [name for name in counts if len(experts.leaves[name].shape) > 1]
    assert matrices
    assert all(counts[name] == {1} for name in matrices)


def streamed_precisions(monkeypatch, experts, **options):
    """Fits a few tasks at a time, all leaves being large; the solutions of `certified.solve_parts`, and the state."""
    solve, solutions = certified.solve_parts, []

    def spy(*arguments):
        solutions.append(solve(*arguments))
        return solutions[-1]

    with monkeypatch.context() as patch:
        patch.setattr(certified, "_LEAST_PRODUCTS", 0)
        patch.setattr(certified, "TOLERANCE", _TINY)
        patch.setattr(certified, "solve_parts", spy)
        return solutions, FIT(experts, rank=2, stack_bytes=1, **options)


@pytest.mark.parametrize("weights", ["equal", "energy"])
def test_large_leaves_are_multiplied_in_single_precision(experts, monkeypatch, weights, tmp_path):
    path = tmp_path / "offsets.safetensors"
    solutions, state = streamed_precisions(monkeypatch, experts, task_weights=weights, file=path)
    assert solutions and all(solutions)
    want = FIT(experts, rank=2, task_weights=weights)
    assert state.report.residual == pytest.approx(want.report.residual, rel=1e-4)
    assert state.report.energy == pytest.approx(want.report.energy, rel=1e-6)
    assert want.report.residual / (1 + _TINY) <= state.report.optimum <= want.report.residual
    assert_close(rtx.offsets.recover(state, 3), rtx.offsets.recover(want, 3), atol=2e-3)
    loaded = factor_file.load(path)
    for name, form in state.offsets.items():
        for one, same in zip(
            jax.tree.leaves(form), jax.tree.leaves(loaded.offsets[name]), strict=True
        ):
            np.testing.assert_array_equal(one, same)


def test_what_is_not_certified_is_solved_in_double_precision(experts, monkeypatch, tmp_path):
    want = FIT(experts, rank=2)
    monkeypatch.setitem(certified._FLOOR, "float32", 2.0)
    path = tmp_path / "offsets.safetensors"
    solutions, state = streamed_precisions(monkeypatch, experts, file=path)
    assert solutions and not any(solutions)
    assert_close(rtx.offsets.recover(state, 3), rtx.offsets.recover(want, 3))
    assert state.report.optimum == pytest.approx(want.report.optimum, rel=1e-6)
    factor_file.load(path)


@pytest.mark.parametrize("options", [{"bits": 3}, {"precision": "float64"}], ids=str)
def test_what_is_coded_or_asked_for_is_solved_in_double_precision(experts, monkeypatch, options):
    solutions, state = streamed_precisions(monkeypatch, experts, **options)
    assert not solutions and np.isfinite(state.report.optimum)


def test_a_side_that_is_too_large_for_a_gram_matrix(experts, monkeypatch):
    want = FIT(experts, rank=2)
    monkeypatch.setattr(exact, "MAX_GRAM", 1)
    found = FIT(experts, rank=2, stack_bytes=1)
    assert np.isnan(found.report.optimum)
    assert found.report.residual == pytest.approx(want.report.residual, rel=1e-4)
    assert found.report.energy == pytest.approx(want.report.energy, rel=1e-6)
    assert_close(rtx.offsets.recover(found, 3), rtx.offsets.recover(want, 3), atol=2e-3)


def test_single_precision_certifies_nothing(experts):
    state = FIT(experts, rank=2, stack_bytes=1, precision="float32")
    want = FIT(experts, rank=2)
    assert np.isnan(state.report.optimum)
    assert state.report.residual == pytest.approx(want.report.residual, rel=1e-4)


@pytest.mark.parametrize("num_tasks", [1, 8, 9, 64])
@pytest.mark.parametrize("stack_bytes", [1, 1000, 5000])
@pytest.mark.parametrize(("bits", "least"), [(3, 8), (32, 1)])
def test_chunks(num_tasks, stack_bytes, bits, least):
    parts = streamed.chunks(num_tasks, 100, stack_bytes, bits)
    assert [task for part in parts for task in part] == list(range(num_tasks))
    assert all(len(part) % least == 0 for part in parts[:-1])
    assert all(len(part) == least or 100 * len(part) <= stack_bytes for part in parts[:-1])


@pytest.mark.parametrize("bits", [1, 3, 4, 8, 16, 32])
def test_joined_codes_are_the_codes_of_the_whole(bits):
    array = np.random.default_rng(0).normal(size=(19, 3, 5)).astype(np.float32)
    parts = [code(array[start : start + 8], bits, axis=-2) for start in (0, 8, 16)]
    whole, joined = code(array, bits, axis=-2), concatenate(parts)
    np.testing.assert_array_equal(dense(joined), dense(whole))
    for one, other in zip(jax.tree.leaves(joined), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("num_tasks", "size"), [(32, 4), (128, 4), (1000, 5), (28, 7), (13, 7)])
def test_parts_are_of_one_size_where_one_divides_the_tasks(num_tasks, size):
    parts = streamed.chunks(num_tasks, 100, 4 * 700)
    sizes = [len(part) for part in parts]
    assert sizes[:-1] == [size] * (len(parts) - 1)
    assert sizes[-1] == num_tasks % size or sizes[-1] == size


@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_no_part_but_the_one_before_is_held_while_one_is_read(monkeypatch, precision):
    monkeypatch.setattr(certified, "_LEAST_PRODUCTS", 0)
    monkeypatch.setattr(certified, "TOLERANCE", _TINY)
    drawn = np.random.default_rng(0).normal(size=(12, 40, 6)).astype(np.float32)
    parts, held, before = streamed.chunks(12, 1, 16), [], []

    def read(tasks):
        before.append(sum(part() is not None for part in held))
        part = jax.numpy.asarray(drawn[tasks.start : tasks.stop])
        held.append(weakref.ref(part))
        return part

    streamed.solve(read, parts, (40, 6), 2, np.ones(12), max_gram=8, precision=precision)
    again = 0 if precision == "auto" else 1
    assert before == [0, 1, 1, 0, again, again]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_over_a_part_take_less_than_the_part(dtype):
    shape = (2, 1 << 13, 64)
    offsets, weights = (jax.ShapeDtypeStruct(size, np.float32) for size in (shape, shape[:1]))
    with jax.enable_x64(True):
        total = jax.ShapeDtypeStruct((), dtype)
        gram = jax.ShapeDtypeStruct((64, 64), dtype)
        shared = jax.ShapeDtypeStruct((4, 64), np.float32)
        programs = [
            streamed._add.lower(gram, total, offsets, weights),
            streamed._project.lower(total, offsets, weights, shared, bits=32),
        ]
        for program in programs:
            analysis = program.compile().memory_analysis()
            assert analysis.temp_size_in_bytes < 4 * np.prod(shape)


def test_sums_over_blocks_are_sums_over_all_rows():
    stack = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)
    for rows in (1, 5, 23, 40):
        total = fold_rows(lambda sums, some: sums + some.sum(axis=0), np.zeros(3), stack, rows=rows)
        np.testing.assert_allclose(total, stack.sum(axis=0), rtol=1e-5, atol=1e-5)


def test_leaves_that_are_matrices_as_they_are_read_are_not_copied(experts, monkeypatch):
    plan = next(iter(plan_leaves(experts.leaves, experts.layout, 2, "paper", "right").values()))
    values = jax.numpy.zeros((2, 3, 4))
    monkeypatch.setattr(differences, "vectors", lambda *_: values)
    as_it_is = tree.MatrixView((0,), (1,))
    for side, view in (("right", as_it_is), ("left", tree.MatrixView((1,), (0,)))):
        found = differences.matrices(experts, {}, "a", replace(plan, view=view, orientation=side))
        assert found is values
    turned = differences.matrices(
        experts, {}, "a", replace(plan, view=as_it_is, orientation="left")
    )
    assert turned.shape == (2, 4, 3)
