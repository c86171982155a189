import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retex_jax import tree
from retex_jax.offsets.coding import (
    BITS,
    Coded,
    code,
    coded_bytes,
    dense,
    levels,
    pack,
    unpack,
)

FEW_BITS = [bits for bits in BITS if bits < 8]


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_unpacks_what_was_packed(data):
    bits = data.draw(st.sampled_from(FEW_BITS))
    indices = np.array(
        data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70)), np.int32
    )
    packed = pack(indices, bits)
    assert packed.dtype == np.uint8
    assert packed.size == -(-indices.size * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, indices.size), indices)
    np.testing.assert_array_equal(pack(jnp.asarray(indices), bits), packed)


def test_packed_bytes_by_hand():
    np.testing.assert_array_equal(pack(np.array([5, 1, 7]), 3), [0b10100111, 0b10000000])
    np.testing.assert_array_equal(pack(np.array([3, 0, 2, 1, 1]), 2), [0b11001001, 0b01000000])


@pytest.mark.parametrize("bits", FEW_BITS)
def test_levels_are_optimal_for_a_normal_distribution(bits):
    # Lloyd's condition: each level is the mean of what is nearest to it; by a fine grid of the density.
    x = np.linspace(-9, 9, 400_001)
    density = np.exp(-(x**2) / 2)
    table = levels(bits).astype(np.float64)
    assert table.size == 2**bits
    np.testing.assert_array_equal(table, -table[::-1])
    nearest = np.searchsorted((table[1:] + table[:-1]) / 2, x)
    mass = np.bincount(nearest, density)
    np.testing.assert_allclose(np.bincount(nearest, density * x) / mass, table, atol=2e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [-1, -2, (1, 2)])
def test_codes_match_a_float64_reference(bits, axis):
    array = normal((3, 40, 7)) * np.float32(1e-4)
    found = np.asarray(dense(code(array, bits, axis)), np.float64)
    want = reference(array.astype(np.float64), bits, axis)
    # A scale is rounded to bfloat16; an 8-bit entry may then be the next integer.
    step = np.abs(array).max() * (1 / 127 if bits == 8 else 2.0**-8)
    np.testing.assert_allclose(found, want, atol=step if bits < 32 else 0)


def reference(array, bits, axis):
    """Every entry by the definition, with scales that are not rounded."""
    if bits == 32:
        return array
    if bits >= 8:
        scale = np.abs(array).max(axis, keepdims=True) / (1 if bits == 16 else 127)
        scaled = array / scale
        return scale * (scaled.astype(np.float16) if bits == 16 else np.round(scaled))
    table = levels(bits).astype(np.float64)
    deviation = np.sqrt((array**2).mean(axis, keepdims=True))
    distance = np.abs((array / deviation)[..., None] - table)
    chosen = table[distance.argmin(-1)]
    return chosen * (array * chosen).sum(axis, keepdims=True) / (chosen**2).sum(axis, keepdims=True)


@pytest.mark.parametrize(
    ("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)]
)
def test_distortion_is_the_published_one(bits, distortion):
    array = normal((4, 20_000))
    error = np.sum((dense(code(array, bits, -1)) - array) ** 2) / np.sum(array**2)
    assert error == pytest.approx(distortion, rel=0.03)


def test_more_bits_are_nearer():
    array = normal((8, 300))
    errors = [float(np.sum((dense(code(array, bits, -1)) - array) ** 2)) for bits in BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@pytest.mark.parametrize("bits", BITS)
def test_numpy_jax_and_jit_agree(bits):
    array = normal((2, 5, 9))
    on_host = code(array, bits, -2)
    traced = jax.jit(code, static_argnums=(1, 2))(jnp.asarray(array), bits, -2)
    assert isinstance(on_host if bits == 32 else on_host.codes, np.ndarray)
    np.testing.assert_allclose(dense(on_host), dense(traced), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.jit(dense)(traced), dense(traced), rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_counted_as_stored(bits):
    array = normal((3, 11, 5))
    assert coded_bytes(array.size, 3 * 5, bits) == tree.param_bytes(code(array, bits, -2))


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zero_and_empty_arrays_empty(bits):
    np.testing.assert_array_equal(dense(code(np.zeros((2, 6), "f4"), bits, -1)), 0)
    assert dense(code(np.zeros((0, 6), "f4"), bits, -1)).shape == (0, 6)


def test_unknown_bits():
    with pytest.raises(ValueError, match=r"bits: got 5, expected one of \[1, 2, 3, 4, 8, 16, 32\]"):
        code(normal((2, 2)), 5, -1)


def test_is_a_pytree():
    coded = code(normal((2, 3)), 3, -1)
    assert isinstance(coded, Coded)
    again = jax.tree.map(lambda x: x, coded)
    assert (again.bits, again.shape) == (3, (2, 3))
