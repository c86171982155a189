"""Runs a model's blocks one by one, or as one compiled scan over stacked parameters.

Unrolled, block i has the parameters "blocks_i/...". Scanned, all blocks share the names "blocks/..." and
each leaf has a leading axis of the number of layers: the program that XLA compiles does not grow with the
depth. Mergers and offsets take the unrolled form; `stack_blocks` and `unstack_blocks` convert.
"""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from retex_jax import tree
from retex_jax.typing import Params

_BLOCK = re.compile(r"blocks_(\d+)")
_STACKED = "blocks"


def run_blocks(
    make: Callable[[str], nn.Module],
    body: Callable[[nn.Module, jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    xs: Any = None,
    *,
    num_layers: int,
    depth: int,
    scan: bool,
) -> tuple[jax.Array, Any]:
    """Runs the first blocks of a model; to be called from a compact method.

    Args:
      make: name -> a new block of that name.
      body: (block, x, its entry of xs) -> (next x, output of this block), the same for all blocks.
      x: what the first block takes.
      xs: pytree of inputs a block, [num_layers, ...] each, or None.
      num_layers: number of blocks of the model.
      depth: how many of them run.
      scan: whether the parameters are stacked.

    Returns:
      What the last block gives, and the outputs of all blocks that ran, stacked: [depth, ...].
    """
    xs = jax.tree.map(lambda leaf: leaf[:depth], xs)
    if not scan:
        outputs = []
        for i in range(depth):
            x, y = body(make(f"{_STACKED}_{i}"), x, jax.tree.map(lambda leaf, i=i: leaf[i], xs))
            outputs.append(y)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    def scanned(block: nn.Module, x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        return nn.scan(
            body, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth
        )(block, x, xs)

    if depth < num_layers:
        scanned = nn.map_variables(
            scanned,
            "params",
            trans_in_fn=lambda params: jax.tree.map(lambda leaf: leaf[:depth], params),
        )
    return scanned(make(_STACKED), x, xs)


def stack_blocks(params: Params) -> dict:
    """Converts the parameters of an unrolled model to those of the scanned one.

    Args:
      params: nested dict; wherever "blocks_0", "blocks_1", ... stand side by side they are stacked.

    Returns:
      Nested dict with "blocks" instead, whose leaves are [num_layers, ...].

    Raises:
      ValueError: if the blocks are not numbered 0, 1, ..., or their leaves differ in name, shape or
        dtype from those of the first; all that differ are listed.
    """
    stacked, blocks = {}, {}
    for name, value in params.items():
        if match := _BLOCK.fullmatch(name):
            blocks[int(match[1])] = value
        else:
            stacked[name] = stack_blocks(value) if isinstance(value, dict) else value
    if blocks:
        if sorted(blocks) != list(range(len(blocks))):
            raise ValueError(f"blocks: got the numbers {sorted(blocks)}, expected 0, 1, ...")
        in_order = [blocks[i] for i in range(len(blocks))]
        _check_alike(in_order)
        stacked[_STACKED] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_order)
    return stacked


def _check_alike(blocks: list[Params]) -> None:
    first, *others = (tree.flatten(block) for block in blocks)
    problems = []
    for i, block in enumerate(others, start=1):
        where = f"{_STACKED}_{i}"
        problems += [f"{where}/{name}: missing" for name in sorted(first.keys() - block.keys())]
        problems += [f"{where}/{name}: not in blocks_0" for name in sorted(block.keys() - first)]
        for name in sorted(first.keys() & block.keys()):
            want, got = ((x.shape, x.dtype) for x in (first[name], block[name]))
            if got != want:
                problems.append(
                    f"{where}/{name}: {got[1]}{list(got[0])}, expected {want[1]}{list(want[0])}"
                )
    if problems:
        raise ValueError("blocks: " + "; ".join(problems))


def unstack_blocks(params: Params) -> dict:
    """Undoes `stack_blocks`.

    Raises:
      ValueError: if the leaves below a "blocks" differ in their leading axis.
    """
    unstacked = {}
    for name, value in params.items():
        if name == _STACKED:
            depths = {leaf.shape[0] for leaf in jax.tree.leaves(value)}
            if len(depths) != 1:
                raise ValueError(f"blocks: leading axes {sorted(depths)}, expected one length")
            for i in range(depths.pop()):
                unstacked[f"{_STACKED}_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], value)
        else:
            unstacked[name] = unstack_blocks(value) if isinstance(value, dict) else value
    return unstacked
