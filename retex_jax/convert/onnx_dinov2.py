"""Reads the DINOv2 backbone out of an ONNX file that was exported from a torch model.

An export keeps the names of biases, norms and scales, but folds the transposed kernels and the two
parts of the position table into anonymous constants. A kernel gets its name from the bias of the
Add that its MatMul feeds; the position table's halves are found by what they are added to: the
Concat of a [1, 1, d] constant with the resized [1, side**2, d] one. Only the `onnx` package's
parser is used; nothing is executed.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

PREFIX = "backbone."


def read_onnx_backbone(data: bytes, prefix: str = PREFIX) -> dict[str, np.ndarray]:
    """Reads the tensors of a Dinov2Model from an ONNX file.

    Args:
      data: the file's content.
      prefix: what the backbone's names start with in the file; other tensors are left out.

    Returns:
      Dinov2Model's names (without the prefix) -> arrays in torch layout: linear weights [out, in],
      the position table [1, 1 + side**2, d].

    Raises:
      ValueError: if `data` is not an ONNX model, no initialiser starts with `prefix`, or the
        position table is not found.
      RuntimeError: if the `onnx` package is not installed.
    """
    graph = _parse(data).graph
    from onnx import numpy_helper

    raw = {tensor.name: tensor for tensor in graph.initializer}
    tensors = {
        name.removeprefix(prefix): np.array(numpy_helper.to_array(tensor))
        for name, tensor in raw.items()
        if name.startswith(prefix)
    }
    if not tensors:
        raise ValueError(f"prefix={prefix!r}: no initialiser of the ONNX file starts with it")

    kernel_of = {}
    for node in graph.node:
        if node.op_type == "MatMul":
            kernels = [name for name in node.input if name in raw]
            if len(kernels) == 1:
                kernel_of[node.output[0]] = kernels[0]
    for node in graph.node:
        if node.op_type != "Add":
            continue
        biases = [n for n in node.input if n.startswith(prefix) and n.endswith(".bias")]
        products = [name for name in node.input if name in kernel_of]
        if len(biases) == 1 and len(products) == 1:
            kernel = np.array(numpy_helper.to_array(raw[kernel_of[products[0]]]))
            name = biases[0].removeprefix(prefix).removesuffix("bias") + "weight"
            tensors[name] = np.ascontiguousarray(kernel.T)  # MatMul multiplies from the right

    if "embeddings.position_embeddings" not in tensors:
        tensors["embeddings.position_embeddings"] = _position_table(graph, raw, numpy_helper)
    return tensors


def _parse(data: bytes) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise RuntimeError(
            "reading an ONNX file needs the `onnx` package: pip install 'retex_jax[demo]'"
        ) from error
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise ValueError(f"not an ONNX file ({len(data)} bytes): {error}") from None
    if not model.graph.node:
        raise ValueError(f"not an ONNX file ({len(data)} bytes): it holds no graph")
    return model


def _position_table(graph: Any, raw: Mapping[str, Any], numpy_helper: Any) -> np.ndarray:
    """Finds and joins the class token's row [1, 1, d] and the grid [1, side**2, d]."""
    grids = [
        name
        for node in graph.node
        if node.op_type == "Reshape"
        for name in node.input[:1]
        if name in raw and _is_grid(raw[name].dims)
    ]
    rows = [
        name
        for node in graph.node
        if node.op_type == "Concat"
        for name in node.input
        if name in raw and list(raw[name].dims[:2]) == [1, 1] and len(raw[name].dims) == 3
    ]
    pairs = [(r, g) for r in rows for g in grids if raw[r].dims[2] == raw[g].dims[2]]
    if len(pairs) != 1:
        raise ValueError(f"expected one position table in the ONNX file, found {len(pairs)}")
    row, grid = (np.array(numpy_helper.to_array(raw[name])) for name in pairs[0])
    return np.concatenate([row, grid], axis=1)


def _is_grid(dims: Any) -> bool:
    return len(dims) == 3 and dims[0] == 1 and dims[1] == math.isqrt(dims[1]) ** 2 and dims[1] > 1
