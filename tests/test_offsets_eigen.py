import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_eigen as reference
from expert_sets import expert_set

import retex_jax as rtx
from retex_jax.offsets import certified, eigen, exact

RETEX = rtx.METHODS["retex"]
RANK = 24
KINDS = ["decaying", "steep", "flat", "random", "tied", "equal", "low rank", "zero"]


@pytest.fixture
def iterating(monkeypatch):
    """Small matrices take the way of large ones."""
    monkeypatch.setattr(eigen, "MOST_DIRECT", 0)


def gram_of(kind, dtype, size=200):
    stack = reference.stack(kind, (2, size, size), RANK).reshape(-1, size).astype(np.float64)
    return jnp.asarray(stack.T @ stack, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_never_below_the_truth(kind, dtype, iterating):
    with jax.enable_x64(True):
        gram = gram_of(kind, dtype)
        wanted = np.array(gram, np.float64)
        found = eigen.leading(gram, RANK, 1e-5)
    if found is None:
        assert kind in ("tied", "equal", "zero", "low rank")
        return
    vectors = np.asarray(found.vectors, np.float64)
    captured, overlaps = vectors.T @ wanted @ vectors, vectors.T @ vectors
    np.testing.assert_allclose(overlaps, np.eye(len(overlaps)), atol=1e-5)
    most = reference.captured(wanted, RANK)
    bound = eigen.most_captured(captured, overlaps, found, RANK, 0.0)
    assert bound >= most * (1 - 1e-12)
    if kind in ("decaying", "flat", "random"):
        left = np.trace(wanted) - most
        assert bound - most <= 1e-4 * left
        assert most - np.trace(captured[:RANK, :RANK]) <= 1e-5 * left


def test_almost_equal_ranks_share_their_programs(iterating):
    with jax.enable_x64(True):
        eigen.leading(gram_of("flat", "float32"), 17, 1e-5)
        programs = eigen._filter._cache_size()
        for rank in range(18, 33):
            eigen.leading(gram_of("flat", "float32"), rank, 1e-5)
    assert eigen._filter._cache_size() == programs


def test_a_gram_matrix_is_summed_beside_little():
    offsets, probes = jax.ShapeDtypeStruct((8, 768, 3072), jnp.float32), eigen.probes(3072)
    with jax.enable_x64(True):
        memory = certified._products.lower(offsets, probes, "float32").compile().memory_analysis()
    # All blocks together are 5/8 of the matrix: they are not held twice, as sums and as products.
    assert memory.temp_size_in_bytes < 7 / 12 * 4 * 3072**2


@pytest.mark.parametrize("direct", [True, False])
def test_the_bound_holds_for_a_matrix_with_an_error(direct, monkeypatch):
    monkeypatch.setattr(eigen, "MOST_DIRECT", 1000 if direct else 0)
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        gram = gram_of("flat", "float64")
        exactly = np.array(gram)
        found = eigen.leading(gram, RANK, 1e-5)
    vectors = np.asarray(found.vectors)
    assert found.vectors.shape == (200, 48)  # rank 24 and 16 beyond, rounded up
    for scale in (1e-6, 1e-4, 1e-2):
        noise = rng.normal(size=exactly.shape)
        noise = scale * (noise + noise.T)
        true = exactly + noise
        bound = eigen.most_captured(
            vectors.T @ true @ vectors,
            vectors.T @ vectors,
            found,
            RANK,
            float(np.linalg.norm(noise)),
        )
        most = reference.captured(true, RANK)
        assert bound >= most * (1 - 1e-12)
        if scale == 1e-6:
            assert bound <= most * (1 + 1e-4)


@pytest.mark.parametrize(("ratio", "most_over_defect"), [(0.1, 1.6), (1.0, 7.0), (3.0, 40.0)])
def test_the_bound_holds_for_an_error_along_the_defect(ratio, most_over_defect):
    """C + F = [[2, e + f], [e + f, 1]] and Q the first axis: E and F Q add up, and more than their squares do."""
    e = 1e-3
    noise = np.array([[0, ratio * e], [ratio * e, 0]])
    true = np.array([[2, e], [e, 1]]) + noise
    found = eigen.Leading(
        jnp.eye(2)[:, :1], np.array([[e * e]]), 0.0, beyond=1.0, spectrum=np.array([2.0, 1.0])
    )
    bound = eigen.most_captured(true[:1, :1], np.eye(1), found, 1, float(np.linalg.norm(noise)))
    assert bound >= reference.captured(true, 1)
    assert bound - 2 <= most_over_defect * e * e


@pytest.mark.parametrize("kind", ["decaying", "steep", "flat", "random"])
@pytest.mark.parametrize("turns", [0, 1, 3])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3])
def test_the_bound_holds_for_a_block_that_has_not_converged(kind, turns, scale):
    """Whatever the block is, and with an error of C beside."""
    rng = np.random.default_rng(turns)
    exactly = np.asarray(gram_of(kind, "float32"), np.float64)
    block = np.linalg.qr(rng.normal(size=(200, 40)))[0]
    for _ in range(turns):
        block = np.linalg.qr(exactly @ block)[0]
    values, turn = np.linalg.eigh(block.T @ exactly @ block)
    block, values = block @ turn[:, ::-1], values[::-1]
    defect = exactly @ block - block * values
    beside = np.linalg.qr(block, mode="complete")[0][:, 40:]
    beyond = np.linalg.eigvalsh(beside.T @ exactly @ beside)[-1]
    found = eigen.Leading(jnp.asarray(block), defect.T @ defect, 0.0, float(beyond), values)
    noise = rng.normal(size=exactly.shape)
    noise = scale * np.linalg.norm(defect, 2) * (noise + noise.T)
    true = exactly + noise
    bound = eigen.most_captured(
        block.T @ true @ block, np.eye(40), found, RANK, float(np.linalg.norm(noise))
    )
    assert bound >= reference.captured(true, RANK) * (1 - 1e-12)


def test_a_product_with_a_transposed_matrix():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(1100, 1100)).astype(np.float32)  # of parts that are not all equal
    vectors = rng.normal(size=(1100, 3))
    with jax.enable_x64(True):
        product = np.asarray(eigen._multiply_transposed(jnp.asarray(matrix), jnp.asarray(vectors)))
    assert product.dtype == np.float64
    np.testing.assert_allclose(product, matrix.astype(np.float64).T @ vectors, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["decaying", "flat", "random"])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_estimated_edge_is_near_the_eigenvalue_of_that_order(kind, share):
    gram = gram_of(kind, "float32", 400)
    eigenvalues = np.linalg.eigvalsh(np.asarray(gram, np.float64))[::-1]
    vectors = np.random.default_rng(0).normal(size=(400, eigen.PROBES))
    top, edge = eigen._estimated_edge(gram, jnp.asarray(vectors, jnp.float32), share)
    assert 0.97 * eigenvalues[0] <= top <= 1.0001 * eigenvalues[0]
    wanted = round(share * 400)
    assert eigenvalues[round(1.5 * wanted)] <= edge <= eigenvalues[wanted // 2]


def test_one_filter_is_enough_for_random_offsets(iterating, monkeypatch):
    degrees = []
    monkeypatch.setattr(
        eigen, "_filter", lambda *args, run=eigen._filter: degrees.append(args[-1]) or run(*args)
    )
    assert eigen.leading(gram_of("random", "float32", 600), 100, certified.TOLERANCE) is not None
    assert len(degrees) == 1


def test_a_subspace_that_misses_an_eigenvector_is_not_proven():
    """The first eigenvector is orthogonal to the block: nothing that the block sees is wrong."""
    size, width = 60, 20
    gram = jnp.diag(jnp.concatenate([jnp.array([3.0]), jnp.linspace(2, 1, size - 1)]))
    with jax.enable_x64(True):
        gram = gram.astype(jnp.float64)
        basis = jnp.eye(size, dtype=jnp.float64)[:, 1 : width + 1]
        image = gram @ basis
        values = jnp.diagonal(basis.T @ image)
        missed = eigen._prove(gram.copy(), basis, image, values, 1.8, 6.0)
        whole = jnp.eye(size, dtype=jnp.float64)[:, :width]
        values, image = jnp.diagonal(whole.T @ gram @ whole), gram @ whole
        proven = eigen._prove(gram, whole, image, values, 1.8, 6.0)
    assert not bool(missed[3])
    assert bool(proven[3])
    assert float(proven[2]) < 1e-12


def test_estimated_norms_are_above_the_truth():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        probes = np.asarray(eigen.probes(50))
        for rank in (1, 5, 50):
            matrix = rng.normal(size=(30, rank)) @ rng.normal(size=(rank, 50))
            bound = float(eigen.norm_bound(jnp.asarray(matrix @ probes)))
            assert 1 <= bound / np.linalg.norm(matrix) <= 6


@pytest.mark.parametrize("shape", [(3, 60, 90), (2, 40, 130), (8, 130, 40), (1, 70, 70)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("iterates", [True, False])
def test_certified_solutions(kind, shape, iterates, monkeypatch):
    monkeypatch.setattr(eigen, "MOST_DIRECT", 0 if iterates else 1000)
    rank = 8
    offsets = reference.stack(kind, shape, rank)
    solution = certified.solve(lambda: jnp.asarray(offsets), rank)
    values = reference.squared_singular_values(offsets)
    least, energy = values[rank:].sum(), values.sum()
    if solution is None:
        # What no proof within the tolerance is possible for, or none was needed.
        assert kind in ("tied", "equal", "zero", "low rank", "steep")
        return
    factors, shared = np.asarray(solution.task_factors), np.asarray(solution.shared_factor)
    assert factors.shape == (*shape[:2], rank)
    assert shared.shape == (rank, shape[2])
    assert factors.dtype == shared.dtype == np.float32
    np.testing.assert_allclose(shared @ shared.T, np.eye(rank), atol=1e-5)
    residual = reference.residual(offsets, factors, shared)
    rounding = 3e-11 * energy
    assert solution.residual == pytest.approx(residual, rel=1e-5, abs=rounding)
    assert solution.energy == pytest.approx(energy, rel=1e-6)
    assert solution.optimum <= least * (1 + 1e-6) + rounding
    assert residual <= (1 + 1e-4) * least + rounding
    assert solution.residual <= (1 + 1e-4) * solution.optimum + rounding
    known = len(solution.spectrum)
    assert known >= rank
    np.testing.assert_allclose(
        solution.spectrum[:rank], values[:rank], rtol=1e-3, atol=1e-5 * energy
    )


@pytest.mark.parametrize("shape", [(5, 60, 40), (4, 300, 30), (7, 9, 50), (3, 600, 1030)])
@pytest.mark.parametrize("kind", KINDS)
def test_certified_solutions_in_parts(kind, shape, monkeypatch):
    num_tasks, rank = shape[0], 8
    if shape[2] < certified._LEAST_SIDE:  # whose rounding is larger than what is certified
        monkeypatch.setattr(certified, "TOLERANCE", 1e-2)
    offsets = reference.stack(kind, shape, rank)
    weights = np.linspace(0.5, 2, num_tasks).astype(np.float32)
    put = {}

    def passes():
        for part in (range(2), range(2, 3), range(3, num_tasks)):
            if part:
                own = jnp.asarray(offsets[part.start : part.stop])
                yield part, own, jnp.asarray(weights[part.start : part.stop])

    solution = certified.solve_parts(
        passes, shape[2], rank, lambda part, own: put.update(zip(part, own, strict=True))
    )
    weighed = offsets * weights[:, None, None]
    values = reference.squared_singular_values(weighed)
    least, energy = values[rank:].sum(), values.sum()
    if solution is None:
        assert kind != "flat"
        assert kind != "decaying" or least < 0.02 * energy
        return
    shared = np.asarray(solution.shared_factor)
    factors = np.stack([put[task] for task in range(num_tasks)])
    assert factors.dtype == shared.dtype == np.float32
    np.testing.assert_allclose(factors, offsets @ shared.T, rtol=1e-4, atol=1e-5)
    residual = reference.residual(weighed, factors * weights[:, None, None], shared)
    assert solution.residual == pytest.approx(residual, rel=1e-5)
    assert solution.energy == pytest.approx(energy, rel=1e-6)
    assert solution.optimum <= least * (1 + 1e-6)
    assert residual <= (1 + 1e-4) * least
    np.testing.assert_allclose(
        solution.spectrum[:rank], values[:rank], rtol=1e-3, atol=1e-5 * energy
    )


def test_what_is_certified_at_all():
    """Decaying and flat spectra must not fall back: no solution would pass all tests above."""
    for kind in ("decaying", "flat", "random"):
        offsets = reference.stack(kind, (2, 300, 520), RANK)
        solution = certified.solve(lambda offsets=offsets: jnp.asarray(offsets), RANK)
        assert solution is not None
        assert solution.residual <= (1 + certified.TOLERANCE) * solution.optimum


def model(kind="flat", num_tasks=3, seed=0):
    """A leaf that is certified, one that is not, a vector, a scalar and an integer."""
    rng = np.random.default_rng(seed)
    large = reference.stack(kind, (num_tasks, 520, 530), 24, seed)
    pretrained = {
        "large/kernel": np.zeros((530, 520), np.float32),
        "small/kernel": rng.normal(size=(12, 9)).astype(np.float32),
        "small/bias": rng.normal(size=9).astype(np.float32),
        "scale": np.float32(2),
        "step": np.array([1, 2], np.int32),
    }
    experts = [
        {
            "large/kernel": np.ascontiguousarray(large[task].T),
            **{
                name: np.asarray(pretrained[name] + rng.normal(size=pretrained[name].shape), "f4")
                for name in ("small/kernel", "small/bias", "scale")
            },
            "step": pretrained["step"],
        }
        for task in range(num_tasks)
    ]
    return pretrained, experts


@pytest.mark.parametrize(("num_tasks", "kind"), [(1, "flat"), (2, "decaying"), (8, "flat")])
def test_fit_certifies_large_leaves(num_tasks, kind):
    pretrained, experts = model(kind, num_tasks)
    made = expert_set(pretrained, experts)
    state = RETEX.fit(made, rank=24, base=rtx.METHODS["weight_average"].fit(made))
    exactly = RETEX.fit(made, rank=24, precision="float64")
    name = "large/kernel"
    least = exactly.report.optima[name]
    if num_tasks > 1:  # the average of one is the expert itself
        assert state.report.optima[name] != least, "not a bound, so it was not certified"
    assert state.report.residuals[name] <= (1 + 1e-4) * least + 1e-9
    assert state.report.optima[name] <= least * (1 + 1e-6)
    assert 1 - 1e-6 <= state.report.ratio <= 1.0001


def several(count=4):
    """Leaves that are certified, and one that is not."""
    rng = np.random.default_rng(3)
    pretrained = {
        **{f"{index}/kernel": np.zeros((530, 520), np.float32) for index in range(count)},
        "small/kernel": np.zeros((12, 9), np.float32),
    }
    experts = [
        {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in pretrained.items()}
        for _ in range(2)
    ]
    return expert_set(pretrained, experts)


def test_a_stopped_fit_of_certified_leaves_goes_on_to_the_same_file(tmp_path):
    whole, path = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    made, options = several(), {"rank": 24, "group_bytes": 1, "resume": "x"}
    RETEX.fit(made, **options, file=whole)

    def stop(*_):
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            RETEX.fit(made, **options, file=path, progress=stop)
    RETEX.fit(made, **options, file=path)
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("bits", [8, 32])
def test_weighted_and_coded_fits_of_large_leaves(bits):
    made = expert_set(*model())
    options = {"rank": 24, "bits": bits, "task_weights": [1.0, 3.0, 0.5]}
    state = RETEX.fit(made, **options)
    exactly = RETEX.fit(made, **options, precision="float64")
    assert state.report.residual == pytest.approx(exactly.report.residual, rel=1e-3)
    assert state.report.optimum == pytest.approx(exactly.report.optimum, rel=1e-4)


def test_one_precision_for_all_calls():
    assert exact.check_settings(precision="auto") is None
    with pytest.raises(ValueError, match="precision: got 'half', expected one of"):
        exact.check_settings(precision="half")


@pytest.mark.parametrize("size", [70, 512, 1300])
def test_transposed_products_a_few_rows_at_a_time(size):
    rng = np.random.default_rng(0)
    matrix, vectors = rng.normal(size=(size, size)).astype("f4"), rng.normal(size=(size, 3))
    with jax.enable_x64(True):
        found = eigen._multiply_transposed(jnp.asarray(matrix), jnp.asarray(vectors))
    np.testing.assert_allclose(found, matrix.astype(np.float64).T @ vectors, rtol=1e-9, atol=1e-9)


def test_a_proof_holds_two_matrices_at_most():
    size, width, float32 = 2048, 16, 4
    matrix = jax.ShapeDtypeStruct((size, size), jnp.float32)
    basis = jax.ShapeDtypeStruct((size, width), jnp.float32)
    values = jax.ShapeDtypeStruct((width,), jnp.float32)
    with jax.enable_x64(True):
        probe = jax.ShapeDtypeStruct((size, eigen.PROBES), jnp.float64)
        programs = (
            eigen._defects.lower(matrix, basis, basis, values, 1.0, 2.0, probe),
            eigen._deflated.lower(matrix, basis, 1.0, 2.0),
            eigen._cholesky.lower(matrix),
            eigen._checked.lower(matrix, probe, probe),
        )
    for program in programs:
        memory = program.compile().memory_analysis()
        assert memory is not None
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        held += memory.output_size_in_bytes - memory.alias_size_in_bytes
        assert held <= 2.1 * float32 * size**2
