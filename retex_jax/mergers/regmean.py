"""RegMean (arXiv:2212.09849): each linear layer by regression on what the experts' layers give.

For the kernel [in, out] of a linear layer, section 3.2 minimises sum_t ||X_t W - X_t W_t||^2, where X_t are
the inputs that the layer of expert t reads on inputs of task t. The minimum is
W = (sum_t G_t)^-1 sum_t G_t W_t, with G_t = X_t^T X_t. As in both codes G_t is divided by its number of
rows, so that a task with more or longer inputs weighs no more. Section 3.3 multiplies the off-diagonals of
G_t by alpha, alpha G + (1 - alpha) diag(G): 1 is the plain regression, 0 weighs every input on its own.
Everything else, biases and embeddings among it, is averaged.

alpha, as far as it was looked up: the authors' default configuration, and those of DistilBERT and RoBERTa
on GLUE, do not scale (1); those of RoBERTa, T5 and DeBERTa-large on emotions have 0.1. MergeLM's default is
1, fusion_bench takes 0.95 for CLIP and 0.6 for GPT-2. The paper's own 0.9 was not looked up. It is the
default here: near what is used for images and on GLUE, and below 1 the correlation matrix of the inputs has
no eigenvalue below 1 - alpha, so that the equations are well posed however few the inputs are. It is worth
a search on validation data.

What is done beyond the definition, and changes nothing where sum_t G_t is regular:
- The equations are solved for W minus the mean of the experts. What no input ever excites stays the mean:
  an input that is always 0 and, at alpha = 1, a direction whose eigenvalue of the correlation matrix is
  within rounding of 0 (the authors' code inverts such a matrix). One expert stays itself, always.
- Rows that are entirely zero, which is how padding comes, do not count in n. (MergeLM counts padding.)

Numerics: G_t in float32 at the highest matmul precision on the device; sums over tasks and the solution of
the equations in float64 on the host.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from retex_jax import tree
from retex_jax.calibration import (
    Calibration,
    LinearInputs,
    require,
    require_linear_inputs,
    second_moments,
)
from retex_jax.experts import ExpertSet
from retex_jax.mergers.average import average
from retex_jax.mergers.leafwise import merge_leaves
from retex_jax.typing import Batch, Params


def scale_off_diagonals(gram: np.ndarray, alpha: float) -> np.ndarray:
    """Multiplies what is off the diagonal: alpha G + (1 - alpha) diag(G). Section 3.3.

    Args:
      gram: G, [in, in], float64.
      alpha: the factor.

    Returns:
      [in, in], float64.
    """
    scaled = alpha * gram
    np.fill_diagonal(scaled, np.diagonal(gram))
    return scaled


def solve(gram_sum: np.ndarray, moment: np.ndarray, mean: np.ndarray, alpha: float) -> np.ndarray:
    """Solves (sum_t G_t) W = sum_t G_t W_t; what the equations leave open is that of the mean.

    Args:
      gram_sum: sum of the scaled Gram matrices, [in, in], float64.
      moment: sum_t G_t W_t with the same matrices, [in, out], float64.
      mean: of the W_t, [in, out], float64.
      alpha: by which off-diagonals were scaled: below 1 the matrix is regular but for zero rows.

    Returns:
      W, [in, out], float64.
    """
    # With a unit diagonal the inputs' units do not matter.
    diagonal = np.diagonal(gram_sum)
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    matrix = scale[:, None] * gram_sum * scale
    np.fill_diagonal(matrix, 1.0)
    right = scale[:, None] * (moment - gram_sum @ mean)
    if alpha < 1:
        change = np.linalg.solve(matrix, right)
    else:
        values, vectors = np.linalg.eigh(matrix)
        kept = values > values[-1] * len(values) * np.finfo(np.float32).eps
        vectors = vectors[:, kept]
        change = vectors @ ((vectors.T @ right) / values[kept, None])
    return mean + scale[:, None] * change


def fit(
    experts: ExpertSet,
    *,
    key: jax.Array | None = None,
    calibration: Calibration | None = None,
    alpha: float = 0.9,
    group_bytes: int = 2 << 30,
) -> Params:
    """Merges linear layers by regression and averages the rest.

    Which layers are linear is what `calibration.linear_inputs` names; a name that the experts do not
    hold, such as an excluded head's, is ignored.

    Args:
      experts: the experts, in flax layout.
      key: not used; every method takes one.
      calibration: inputs of every task, and `linear_inputs`. The authors take 1000 examples a task,
        fusion_bench 256.
      alpha: factor of the off-diagonals, in [0, 1]; see the module's docstring.
      group_bytes: bytes of matrices that are gathered at once (at least those of one leaf), beside one
        expert, the merged model and the activations of a batch: 12 in^2 + 16 in out for a leaf. Every
        group of leaves costs one more pass: each expert is read and runs over its inputs once more.
        RoBERTa-base needs 3.1 GB for a single pass.

    Returns:
      The merged model.

    Raises:
      ValueError: if the calibration does not fit (see `calibration.require`) or has no
        `linear_inputs`, these do not fit the experts' kernels or are not finite, none of them is an
        expert's, the layout is not "flax", or a keyword is out of its range.
    """
    del key
    problems = []
    if not 0 <= alpha <= 1:
        problems.append(f"alpha: got {alpha!r}, expected a number in [0, 1]")
    if not group_bytes > 0:
        problems.append(f"group_bytes: got {group_bytes!r}, expected a positive number")
    if experts.layout != "flax":
        problems.append(f"layout: got {experts.layout!r}, expected 'flax': the experts are run")
    if problems:
        raise ValueError("\n".join(problems))
    calibration = require(calibration, "regmean", experts.num_tasks)
    linear_inputs = require_linear_inputs(calibration, "regmean")

    shapes = _matrices(experts, linear_inputs, calibration.batches[0])
    solved: dict[str, np.ndarray] = {}
    for names in _groups(shapes, group_bytes):
        group = {name: shapes[name] for name in names}
        solved |= _regress(experts, linear_inputs, calibration.batches, group, alpha)

    def merge_leaf(name: str) -> jax.Array:
        mean = average(experts, name)
        if name not in solved:
            return mean
        return jax.device_put(solved.pop(name).reshape(mean.shape), mean.sharding)

    return merge_leaves(experts, merge_leaf)


def _matrices(
    experts: ExpertSet, linear_inputs: LinearInputs, batches: Iterable[Batch]
) -> dict[str, tuple[int, int]]:
    """(in, out) of the leaves that are solved for; nothing is computed.

    Raises:
      ValueError: if there is none, or the inputs do not fit; all problems are listed.
    """
    specs = {
        name: jax.ShapeDtypeStruct(spec.shape, jax.dtypes.canonicalize_dtype(spec.dtype))
        for name, spec in experts.leaves.items()
    }
    inputs = jax.eval_shape(linear_inputs, tree.unflatten(specs), next(iter(batches)))
    shapes, problems = {}, []
    for name in experts.float_leaves:
        if name not in inputs:
            continue
        shape = experts.leaves[name].shape
        # A kernel of more axes reads its inputs flattened: [k_h, k_w, c_in, out].
        expected = int(np.prod(shape[:-1]))
        if len(shape) < 2 or inputs[name].ndim != 2 or inputs[name].shape[1] != expected:
            problems.append(
                f"calibration.linear_inputs: {name} of shape {shape} has inputs of shape "
                f"{inputs[name].shape}, expected [N, {expected}] and a kernel [..., out]"
            )
        shapes[name] = (expected, shape[-1])
    if problems:
        raise ValueError("\n".join(problems))
    if not shapes:
        raise ValueError(
            f"calibration.linear_inputs: got {sorted(inputs)}, none of which is a leaf of the experts"
        )
    return shapes


def _groups(shapes: Mapping[str, tuple[int, int]], group_bytes: int) -> list[list[str]]:
    """Leaves that are gathered in one pass, in order."""
    groups: list[list[str]] = []
    used = 0
    for name, (rows, columns) in shapes.items():
        needed = 12 * rows**2 + 16 * rows * columns
        if not groups or used + needed > group_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += needed
    return groups


def _regress(
    experts: ExpertSet,
    linear_inputs: LinearInputs,
    batches: Sequence[Iterable[Batch]],
    shapes: Mapping[str, tuple[int, int]],
    alpha: float,
) -> dict[str, np.ndarray]:
    """The merged kernels of one group, [in, out], float32."""
    moments_of = second_moments(linear_inputs, shapes)
    gram_sums = {name: np.zeros((rows, rows)) for name, (rows, _) in shapes.items()}
    moments = {name: np.zeros(shape) for name, shape in shapes.items()}
    sums = {name: np.zeros(shape) for name, shape in shapes.items()}
    for task, expert in enumerate(experts.names):
        params = experts.expert_params(task)
        for name, whole in moments_of(expert, params, batches[task]):
            scaled = scale_off_diagonals(whole, alpha)
            kernel = np.asarray(experts.expert(name, task), np.float64).reshape(shapes[name])
            gram_sums[name] += scaled
            moments[name] += scaled @ kernel
            sums[name] += kernel
    solved = {}
    for name in shapes:
        mean = sums.pop(name) / experts.num_tasks
        merged = solve(gram_sums.pop(name), moments.pop(name), mean, alpha)
        solved[name] = merged.astype(np.float32)
    return solved
