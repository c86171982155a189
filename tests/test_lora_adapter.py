"""Offsets written as LoRA adapters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import retex_jax as rtx
from retex_jax import lora, offsets, tree
from retex_jax.sources import TreeSource

RNG = np.random.default_rng(0)
PREFIX = "base_model.model."


def normal(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


NAMES = {  # flax leaf to torch name, of one small model in both layouts
    "embed/embedding": "token_embedding.weight",
    "conv/kernel": "conv.weight",
    "conv1d/kernel": "conv1d.weight",
    "fc/kernel": "fc.weight",
    "fc/bias": "fc.bias",
    "norm/scale": "norm.weight",
    "norm/bias": "norm.bias",
}
FLAX = {
    "embed/embedding": (9, 6),
    "conv/kernel": (2, 3, 4, 6),
    "conv1d/kernel": (3, 4, 6),
    "fc/kernel": (6, 8),
    "fc/bias": (8,),
    "norm/scale": (6,),
    "norm/bias": (6,),
}
TO_TORCH = {4: (3, 2, 0, 1), 3: (2, 1, 0), 2: (1, 0), 1: (0,)}


def states(fan_in_fan_out=False, extra=(), **options):
    """The same fit of two random experts in the flax and in the torch layout."""
    shapes = FLAX | {name: (6,) for name in extra}
    models = [{name: normal(*shape) for name, shape in shapes.items()} for _ in range(3)]

    def to_torch(name, x):
        keeps = name.endswith("embedding") or (fan_in_fan_out and name == "fc/kernel")
        return x if keeps else x.transpose(TO_TORCH[x.ndim])

    torch_models = [
        {NAMES.get(k, k).replace(".", "/"): to_torch(k, x) for k, x in model.items()}
        for model in models
    ]
    result = []
    for layout, (pretrained, *experts) in (("flax", models), ("torch", torch_models)):
        expert_set = rtx.ExpertSet.from_trees(
            tree.unflatten(pretrained), [tree.unflatten(x) for x in experts], layout=layout
        )
        result.append(offsets.fit(expert_set, **({"rank": 3} | options)))
    return result


def rebuilt(state, adapter, tmp_path, **options):
    """The adapter on the merged model, by our reader."""
    lora.save_adapter(tmp_path, adapter.tensors, adapter.config)
    return lora.LoraSource(tmp_path, TreeSource(state.merged), **options)


def assert_recovers(state, source, task):
    for name, want in tree.flatten(offsets.recover(state, task)).items():
        np.testing.assert_allclose(source.read(name), want, rtol=0, atol=1e-5)


def test_adapter_of_an_offset(tmp_path):
    flax_state, torch_state = states()
    adapter = lora.adapter_from_offset(torch_state, 1, base_model="x/y", task_type="SEQ_CLS")
    assert adapter.left_out == ()
    config = adapter.config
    assert config["target_modules"] == ["conv", "conv1d", "fc", "token_embedding"]
    assert config["modules_to_save"] == ["norm"]
    assert (config["bias"], config["fan_in_fan_out"]) == ("lora_only", False)
    assert (config["base_model_name_or_path"], config["task_type"]) == ("x/y", "SEQ_CLS")
    shapes = {key.removeprefix(PREFIX): x.shape for key, x in adapter.tensors.items()}
    assert shapes == {
        "conv.lora_A.weight": (3, 4, 2, 3),
        "conv.lora_B.weight": (6, 3, 1, 1),
        "conv1d.lora_A.weight": (3, 4, 3),
        "conv1d.lora_B.weight": (6, 3, 1),
        "fc.lora_A.weight": (3, 6),
        "fc.lora_B.weight": (8, 3),
        "fc.base_layer.bias": (8,),
        "token_embedding.lora_embedding_A": (3, 9),
        "token_embedding.lora_embedding_B": (6, 3),
        "norm.weight": (6,),
        "norm.bias": (6,),
    }
    assert_recovers(torch_state, rebuilt(torch_state, adapter, tmp_path), 1)
    with pytest.raises(ValueError, match="torch_names: got none"):
        lora.adapter_from_offset(flax_state, 1)
    # The factors of a flax state are the same products: its adapter gives the same torch model.
    named = lora.adapter_from_offset(flax_state, 1, torch_names=NAMES)
    assert {key: x.shape for key, x in named.tensors.items()} == {
        key: x.shape for key, x in adapter.tensors.items()
    }
    assert_recovers(torch_state, rebuilt(torch_state, named, tmp_path), 1)


def test_adapter_of_weights_stored_as_in_out(tmp_path):
    flax_state, torch_state = states(fan_in_fan_out=True)
    for state, names, pattern in [(torch_state, None, "^fc/"), (flax_state, NAMES, "^fc/")]:
        adapter = lora.adapter_from_offset(state, 0, torch_names=names, transposed=[pattern])
        assert adapter.config["fan_in_fan_out"] is True
        assert adapter.tensors[f"{PREFIX}fc.lora_A.weight"].shape == (3, 6)
        source = rebuilt(torch_state, adapter, tmp_path, transposed=[pattern])
        assert_recovers(torch_state, source, 0)


def test_ranks_differ(tmp_path):
    experts = [{"a": {"weight": normal(8, 9)}, "b": {"weight": normal(2, 9)}} for _ in range(2)]
    state = offsets.fit(rtx.ExpertSet.from_trees(experts[0], experts, layout="torch"), rank=3)
    adapter = lora.adapter_from_offset(state, 1)
    other = {"a": 3, "b": 1}
    del other["a" if adapter.config["r"] == 3 else "b"]
    assert adapter.config["rank_pattern"] == adapter.config["alpha_pattern"] == other
    assert adapter.config["bias"] == "none"
    assert_recovers(state, rebuilt(state, adapter, tmp_path), 1)


def test_what_an_adapter_cannot_hold(tmp_path):
    _, state = states(extra=["class_embedding", "big/scale", "fc/gate", "lone/bias"])
    left_out = ("big/scale", "class_embedding", "fc/gate", "lone/bias")
    with pytest.raises(ValueError, match="an adapter can't hold") as error:
        lora.adapter_from_offset(state, 0)
    assert str(sorted(left_out)) in str(error.value)
    adapter = lora.adapter_from_offset(state, 0, partial=True)
    assert adapter.left_out == left_out
    source = rebuilt(state, adapter, tmp_path)
    merged, recovered = tree.flatten(state.merged), tree.flatten(offsets.recover(state, 0))
    for name in merged:
        want = merged[name] if name in left_out else recovered[name]
        np.testing.assert_allclose(source.read(name), want, rtol=0, atol=1e-5)


def test_norms_whose_names_end_alike():
    # PEFT would also save "fc.subnorm", which is a layer.
    models = [
        {"norm": {"weight": normal(6)}, "fc": {"subnorm": {"weight": normal(6, 6)}}}
        for _ in range(2)
    ]
    state = offsets.fit(rtx.ExpertSet.from_trees(models[0], models, layout="torch"), rank=2)
    with pytest.raises(ValueError, match=r"can't hold the offsets of \['norm/weight'\]"):
        lora.adapter_from_offset(state, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"orientation": "left"},
        {"form": "factorized", "task_rank": 2},
        {"form": "shape_shared"},
        {"rank": None, "budget": 0.5, "sharing": "separate", "bits": 4},
    ],
    ids=["left", "factorized", "shape_shared", "separate"],
)
def test_every_form_of_low_rank_is_an_adapter(tmp_path, options):
    _, state = states(**options)
    adapter = lora.adapter_from_offset(state, 1)
    assert adapter.left_out == ()
    assert_recovers(state, rebuilt(state, adapter, tmp_path), 1)


def test_an_added_task_is_an_adapter(tmp_path):
    _, state = states()
    extended = offsets.add_task(state, offsets.recover(state, 0), budget=0.9, bits=8)
    adapter = lora.adapter_from_offset(extended, 2)
    assert_recovers(extended, rebuilt(extended, adapter, tmp_path), 2)


def test_the_affine_form_is_no_adapter():
    _, state = states(form="affine")
    with pytest.raises(ValueError, match=r"can't hold the offsets of .*fc/weight"):
        lora.adapter_from_offset(state, 0)


def test_unchanged_leaves_are_not_written():
    _, state = states()
    names = ["norm/weight", "norm/bias", "conv/weight"]
    zeros = {name: jax.tree.map(jnp.zeros_like, state.offsets[name]) for name in names}
    state = dataclasses.replace(state, offsets=state.offsets | zeros)
    adapter = lora.adapter_from_offset(state, 0)
    assert adapter.config["modules_to_save"] is None
    assert adapter.config["target_modules"] == ["conv1d", "fc", "token_embedding"]
    assert not [key for key in adapter.tensors if "norm" in key or "conv." in key]
    zeros = jax.tree.map(jnp.zeros_like, state.offsets)
    with pytest.raises(ValueError, match="no matrix has an offset"):
        lora.adapter_from_offset(dataclasses.replace(state, offsets=zeros), 0)


def test_adapter_arguments(tmp_path):
    flax_state, state = states()
    for task in (-1, 2):
        with pytest.raises(ValueError, match=f"task: got {task}, expected 0 to 1"):
            lora.adapter_from_offset(state, task)
    with pytest.raises(ValueError, match="task: got 'a', expected an integer"):
        lora.adapter_from_offset(state, "a")
    for option in ("embeddings", "transposed"):
        with pytest.raises(ValueError, match=f"{option}: got 'x'"):
            lora.adapter_from_offset(state, 0, **{option: "x"})
    names = NAMES | {"fc/kernel": "conv.weight", "absent": "y.weight"}
    with pytest.raises(ValueError, match=r"\['absent'\] are no leaves; \['conv.weight'\] are used"):
        lora.adapter_from_offset(flax_state, 0, torch_names=names)
    with pytest.raises(ValueError, match="tensors: got none"):
        lora.save_adapter(tmp_path, {}, {})
    with pytest.raises(ValueError, match="expected finite JSON"):
        lora.save_adapter(tmp_path, {"a": normal(2)}, {"r": float("nan")})
    assert not list(tmp_path.iterdir())


def test_save_adapter_replaces_whole_files(tmp_path, monkeypatch):
    folder = tmp_path / "new"
    lora.save_adapter(folder, {"a": normal(2)}, {"r": 1})
    before = load_file(folder / "adapter_model.safetensors")["a"]
    assert json.loads((folder / "adapter_config.json").read_text()) == {"r": 1}
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            lora.save_adapter(folder, {"a": normal(2)}, {"r": 2})
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    np.testing.assert_array_equal(load_file(folder / "adapter_model.safetensors")["a"], before)


def test_bfloat16_norms_keep_their_dtype():
    _, state = states()
    merged = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), state.merged)
    adapter = lora.adapter_from_offset(dataclasses.replace(state, merged=merged), 0)
    assert adapter.tensors[f"{PREFIX}norm.weight"].dtype == ml_dtypes.bfloat16
    assert adapter.tensors[f"{PREFIX}fc.lora_A.weight"].dtype == np.float32
