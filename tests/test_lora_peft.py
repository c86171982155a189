"""Adapters that PEFT saves are read as PEFT merges them, and PEFT loads the adapters written here."""

import contextlib
import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import retex_jax as rtx
from retex_jax import lora, offsets, tree
from retex_jax.offsets.forms import Product
from retex_jax.sources import SafetensorsSource

pytestmark = [
    pytest.mark.torch,
    # transformers warns when PEFT asks a model whether it checkpoints its activations.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
TEXT = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
CLIP = {"image_size": 8, "patch_size": 4} | TEXT
GPT2 = {
    "vocab_size": 20,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make(name):
    """A tiny random model; every parameter is random, biases and norms too."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**TEXT, num_key_value_heads=1, pad_token_id=0)
        model = transformers.LlamaForCausalLM(config)
    elif name == "roberta":
        config = transformers.RobertaConfig(**TEXT, max_position_embeddings=12)
        model = transformers.RobertaForSequenceClassification(config)
    elif name == "roberta_backbone":
        config = transformers.RobertaConfig(**TEXT, max_position_embeddings=12)
        model = transformers.RobertaModel(config, add_pooling_layer=False)
    elif name == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    elif name == "gpt2_backbone":
        model = transformers.GPT2Model(transformers.GPT2Config(**GPT2))
    else:
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP))
    randomize(model)
    return model.eval()


def randomize(module, only=""):
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if only in name:
                parameter.normal_(std=0.3).add_(1.0 if "norm" in name.lower() else 0.0)


def output(model):
    """Logits, or the last hidden states."""
    import torch

    rng = np.random.default_rng(0)
    with torch.no_grad():
        if "clip" in model.config.model_type:
            pixels = rng.normal(size=(2, 3, 8, 8)).astype(np.float32)
            return model(pixel_values=torch.from_numpy(pixels)).last_hidden_state.numpy()
        return model(torch.from_numpy(rng.integers(2, 20, (3, 6))))[0].numpy()


def loaded(model, leaves):
    """A copy of a torch model with leaves "a/b"."""
    import torch

    model = copy.deepcopy(model)
    tensors = {
        name.replace("/", "."): torch.from_numpy(np.array(leaf)) for name, leaf in leaves.items()
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}  # tied
    return model


def save_base(model, folder):
    model.save_pretrained(folder)
    return SafetensorsSource(folder)


ADAPTED = {
    "llama": {"target_modules": ["q_proj", "v_proj"]},
    "llama_rslora": {
        "target_modules": ["q_proj", "down_proj"],
        "use_rslora": True,
        "lora_alpha": 3,
    },
    "llama_patterns": {
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 4, "v_proj": 1},
        "alpha_pattern": {r"^model.layers.0.mlp.(gate|up)_proj": 7, "q_proj": 5},
    },
    "llama_embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "roberta": {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    "roberta_bias_all": {
        "target_modules": ["query", "dense"],
        "exclude_modules": r"classifier.*",
        "modules_to_save": ["LayerNorm"],
        "bias": "all",
        "task_type": "SEQ_CLS",
    },
    "roberta_embedding": {"target_modules": ["word_embeddings", "key"], "bias": "lora_only"},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "bias": "lora_only"},
    "clip": {"target_modules": ["q_proj", "fc1", "patch_embedding", "position_embedding"]},
}


@pytest.mark.parametrize("case", ADAPTED)
def test_read_as_peft_merges(case, tmp_path):
    peft = pytest.importorskip("peft")
    model = make(case.split("_")[0])
    source = save_base(model, tmp_path / "base")
    config = peft.LoraConfig(r=2, **ADAPTED[case])
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    for part in ("lora_", "modules_to_save", *(["bias"] if config.bias == "all" else [])):
        randomize(adapted, part)
    if config.bias == "lora_only":
        randomize(adapted, "base_layer.bias")
    with (
        pytest.warns(UserWarning, match="save_embedding")
        if "llama_emb" in case
        else contextlib.nullcontext()
    ):
        adapted.save_pretrained(tmp_path / "adapter")
    apart = output(adapted.eval())
    merged = output(adapted.merge_and_unload())
    expert_set = rtx.ExpertSet.from_lora(source, [tmp_path / "adapter"], names=["x"])
    expert = {name: expert_set.expert(name, 0) for name in expert_set.leaves}
    found = output(loaded(model, expert))
    np.testing.assert_allclose(found, merged, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found, apart, rtol=0, atol=1e-5)
    assert np.abs(found - output(model)).max() > 0.01


def test_head_that_the_base_has_not(tmp_path):
    """The pretrained file is the bare backbone; the adapter was trained on a classifier."""
    peft = pytest.importorskip("peft")
    model = make("roberta")
    source = save_base(model.roberta, tmp_path / "base")
    assert not any(name.startswith("roberta/") for name in source.leaves)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    randomize(adapted, "lora_")
    randomize(adapted, "modules_to_save")
    adapted.save_pretrained(tmp_path / "adapter")
    read = lora.LoraSource(tmp_path / "adapter", source)
    assert set(read.extra) == {
        f"classifier/{layer}/{parameter}"
        for layer in ("dense", "out_proj")
        for parameter in ("weight", "bias")
    }
    expert = {f"roberta/{name}": read.read(name) for name in read.leaves}
    expert |= {name: read.read(name) for name in read.extra}
    want = output(adapted.merge_and_unload())
    np.testing.assert_allclose(output(loaded(model, expert)), want, rtol=0, atol=1e-5)


def leaves_of(model):
    """What a checkpoint of the model has: an output layer only where it is not tied."""
    is_tied = model.config.model_type == "gpt2"
    return {
        name.replace(".", "/"): x.numpy()
        for name, x in model.state_dict().items()
        if name != "lm_head.weight" or not is_tied
    }


def fitted(model, exclude=()):
    """An offset state of two experts, which differ from a torch model in every leaf."""
    leaves = leaves_of(model)
    rng = np.random.default_rng(0)
    experts = [
        {name: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype) for name, x in leaves.items()}
        for _ in range(2)
    ]
    expert_set = rtx.ExpertSet.from_trees(
        tree.unflatten(leaves),
        [tree.unflatten(x) for x in experts],
        layout="torch",
        exclude=exclude,
    )
    return offsets.fit(expert_set, rank=3)


@pytest.mark.parametrize("name", ["llama", "roberta_backbone", "gpt2_backbone", "gpt2", "clip"])
def test_peft_loads_an_offset(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = make(name)
    state = fitted(model, exclude=["class_embedding$"])
    merged = loaded_partly(model, tree.flatten(state.merged))
    want = output(loaded_partly(model, tree.flatten(offsets.recover(state, 1))))
    transposed = [r"/c_(attn|proj|fc)/"] if "gpt2" in name else []
    adapter = lora.adapter_from_offset(state, 1, transposed=transposed)
    assert adapter.left_out == ()
    lora.save_adapter(tmp_path / "adapter", adapter.tensors, adapter.config)
    merged.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert np.abs(output(merged) - want).max() > 0.01
    is_tied = name == "gpt2"  # only when it is merged does an embedding's adapter reach the logits
    adapted = peft.PeftModel.from_pretrained(merged, tmp_path / "adapter").eval()
    if not is_tied:
        np.testing.assert_allclose(output(adapted), want, rtol=0, atol=1e-4)
    np.testing.assert_allclose(output(adapted.merge_and_unload()), want, rtol=0, atol=1e-4)


def loaded_partly(model, leaves):
    return loaded(model, leaves_of(model) | dict(leaves))


def test_peft_loads_other_ranks_and_a_part(tmp_path):
    peft = pytest.importorskip("peft")
    model = make("clip")
    state = fitted(model)
    # One layer keeps a lower rank: its offset's last direction is dropped.
    name = "encoder/layers/0/self_attn/q_proj/weight"
    form = state.offsets[name]
    state = dataclasses.replace(
        state,
        offsets=state.offsets | {name: Product(form.generator[..., :2], form.shared[:2])},
    )
    with pytest.raises(ValueError, match=r"\['embeddings/class_embedding'\]"):
        lora.adapter_from_offset(state, 0)
    adapter = lora.adapter_from_offset(state, 0, partial=True)
    assert list(adapter.config["rank_pattern"].values()) == [2]
    lora.save_adapter(tmp_path, adapter.tensors, adapter.config)
    recovered = tree.flatten(offsets.recover(state, 0))
    recovered["embeddings/class_embedding"] = jnp.asarray(
        tree.flatten(state.merged)["embeddings/class_embedding"]
    )
    merged = loaded_partly(model, tree.flatten(state.merged))
    adapted = peft.PeftModel.from_pretrained(merged, tmp_path).eval()
    want = output(loaded_partly(model, recovered))
    np.testing.assert_allclose(output(adapted), want, rtol=0, atol=1e-4)


def test_peft_reads_the_same_from_our_adapter_as_we(tmp_path):
    """What PEFT saves again after loading our adapter is read as the same expert."""
    peft = pytest.importorskip("peft")
    model = make("roberta_backbone")
    state = fitted(model)
    adapter = lora.adapter_from_offset(state, 0)
    lora.save_adapter(tmp_path / "ours", adapter.tensors, adapter.config)
    merged = loaded_partly(model, tree.flatten(state.merged))
    base = save_base(merged, tmp_path / "merged")
    peft.PeftModel.from_pretrained(merged, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (lora.LoraSource(tmp_path / name, base) for name in ("ours", "theirs"))
    recovered = tree.flatten(offsets.recover(state, 0))
    for name in base.leaves:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))
        if name in recovered:
            np.testing.assert_allclose(ours.read(name), recovered[name], rtol=0, atol=1e-5)
