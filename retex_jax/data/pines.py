"""Loader of a hyperspectral land-cover scene, cut into patches that no two splits share."""

import io
import os

import numpy as np

from retex_jax.data.tasks import Examples
from retex_jax.data.wheels import WHEELS, read_member

_PINES = (
    "alfalfa",
    "corn-notill",
    "corn-mintill",
    "corn",
    "grass-pasture",
    "grass-trees",
    "grass-pasture-mowed",
    "hay-windrowed",
    "oats",
    "soybean-notill",
    "soybean-mintill",
    "soybean-clean",
    "wheat",
    "woods",
    "buildings-grass-trees-drives",
    "stone-steel-towers",
)


def indian_pines(cache: str | os.PathLike | None = None) -> Examples:
    """Loads land-cover patches of a hyperspectral scene, grouped by blocks of the scene.

    Each example is the 11x11 neighbourhood of a labelled pixel in the first three principal
    components of the 200 bands, each clipped to 3 standard deviations and scaled to 0..255. The
    scene is cut into blocks of 12 to 13 pixels a side, which are the groups; a neighbourhood that
    leaves its block is filled by reflection at the block's border, so that no pixel is seen in two
    splits. (The components are those of the whole scene, without labels.) Classes with fewer than
    100 labelled pixels are dropped.

    Returns:
      Examples with images uint8 [n, 11, 11, 3].
    """
    wheel = WHEELS["tensorly"]
    cube = np.load(io.BytesIO(read_member(wheel, "Indian_pines_corrected.npy", cache)))
    truth = np.load(io.BytesIO(read_member(wheel, "Indian_pines_gt.npy", cache)))
    return pines_patches(cube, truth, _PINES)


def pines_patches(
    cube: np.ndarray,
    truth: np.ndarray,
    names: tuple[str, ...],
    *,
    block: int = 12,
    radius: int = 5,
    min_pixels: int = 100,
) -> Examples:
    """Cuts a hyperspectral scene into labelled patches that never leave their block.

    Args:
      cube: the bands, any real dtype [H, W, bands].
      truth: 0 for unlabelled, else 1 + the class index; integers [H, W].
      names: the name of each class.
      block: least side of a block, in pixels.
      radius: a patch has side 2 * radius + 1.
      min_pixels: classes with fewer labelled pixels are dropped.

    Returns:
      Examples with images uint8 [n, 2 * radius + 1, 2 * radius + 1, 3] and the block's number as
      group.
    """
    height, width, bands = cube.shape
    flat = cube.reshape(-1, bands).astype(np.float64)
    flat -= flat.mean(0)
    values, vectors = np.linalg.eigh(flat.T @ flat / len(flat))
    vectors = vectors[:, ::-1][:, :3]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(3)])
    scores = flat @ vectors / np.sqrt(values[::-1][:3])
    scene = np.rint((np.clip(scores, -3, 3) + 3) * (255 / 6)).astype(np.uint8)
    scene = scene.reshape(height, width, 3)

    counts = np.bincount(truth.ravel().astype(np.int64), minlength=len(names) + 1)[1:]
    kept = np.flatnonzero(counts >= min_pixels)
    new_label = np.full(len(names) + 1, -1)
    new_label[kept + 1] = np.arange(len(kept))
    row, column = np.nonzero(new_label[truth] >= 0)
    rows, row_block = _block_window(row, height, block, radius)
    columns, column_block = _block_window(column, width, block, radius)
    return Examples(
        scene[rows[:, :, None], columns[:, None, :]],
        new_label[truth[row, column]],
        tuple(names[k] for k in kept),
        row_block * width + column_block,
    )


def _block_window(
    index: np.ndarray, size: int, block: int, radius: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns coordinates [n, 2 * radius + 1] kept in their block, and the block [n].

    `size` pixels are cut into size // block blocks of nearly equal length.
    """
    num = max(size // block, 1)
    edges = -(-np.arange(num + 1) * size // num)
    which = np.searchsorted(edges, index, side="right") - 1
    start, last = edges[which][:, None], edges[which + 1][:, None] - 1
    period = np.maximum(2 * (last - start), 1)
    offset = np.mod(index[:, None] + np.arange(-radius, radius + 1) - start, period)
    return start + np.minimum(offset, period - offset), which
