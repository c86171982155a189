"""Tests of resizing position grids."""

import numpy as np
import pytest

from retex_jax.convert import resize_position_grid


def grid(side, width=3, seed=0):
    return np.random.default_rng(seed).normal(size=(1 + side * side, width)).astype(np.float32)


def test_same_side_is_the_same_array():
    x = grid(5)
    assert resize_position_grid(x, 5) is x


def test_halving_by_hand():
    # Centres lie half-way between cells: weights -3/32, 19/32, 19/32, -3/32, clamped at the edges.
    x = np.zeros((17, 1), np.float32)
    x[1:, 0] = np.arange(16) ** 2
    weights = np.array([[16, 19, -3, 0], [0, -3, 19, 16]]) / 32
    want = weights @ x[1:, 0].reshape(4, 4) @ weights.T
    np.testing.assert_allclose(resize_position_grid(x, 2)[1:, 0], want.ravel(), rtol=1e-5)


def test_class_row_is_kept_and_constants_stay():
    x = np.full((1 + 37 * 37, 2), 0.7, np.float32)
    x[0] = [5, -5]
    got = resize_position_grid(x, 4)
    assert got.shape == (17, 2) and got.dtype == np.float32
    np.testing.assert_array_equal(got[0], [5, -5])
    np.testing.assert_allclose(got[1:], 0.7, rtol=1e-6)


def test_rows_and_columns_are_not_swapped():
    side = 8
    x = np.zeros((1 + side * side, 2))
    x[1:, 0] = np.repeat(np.arange(side), side)
    x[1:, 1] = np.tile(np.arange(side), side)
    got = resize_position_grid(x, 4)[1:].reshape(4, 4, 2)
    assert np.all(np.diff(got[:, :, 0], axis=0) > 1) and np.allclose(np.diff(got[:, :, 0]), 0)
    np.testing.assert_allclose(got[:, :, 1], got[:, :, 0].T)
    np.testing.assert_allclose(got[1:3, 0, 0], [2.5, 4.5])  # a ramp, away from the edges


@pytest.mark.parametrize("shape", [(6, 3), (1, 3), (0, 3), (5,), (1, 5, 3)])
def test_bad_grids(shape):
    with pytest.raises(ValueError, match=r"expected \[1 \+ side\*\*2, d\]"):
        resize_position_grid(np.zeros(shape), 2)


def test_bad_side():
    with pytest.raises(ValueError, match="new_side=0"):
        resize_position_grid(grid(2), 0)


@pytest.mark.torch
@pytest.mark.parametrize(("old", "new"), [(37, 4), (37, 16), (16, 37), (7, 6), (3, 1), (1, 3)])
def test_equals_torch(old, new):
    torch = pytest.importorskip("torch")
    x = grid(old)
    patches = torch.tensor(x[1:].reshape(1, old, old, 3)).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(
        patches, size=(new, new), mode="bicubic", align_corners=False
    )
    want = want.permute(0, 2, 3, 1).reshape(new * new, 3).numpy()
    np.testing.assert_allclose(resize_position_grid(x, new)[1:], want, rtol=1e-5, atol=1e-5)
