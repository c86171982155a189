"""Tests of loading whole snapshots and of exporting them, against transformers' classes."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from retex_jax import convert, models, tree
from retex_jax.convert import architectures, vit
from retex_jax.convert.export import export
from retex_jax.snapshot import Snapshot

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VISION = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "projection_dim": 6,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "projection_dim": 6,
    "max_position_embeddings": 9,
    "bos_token_id": 28,
    "eos_token_id": 29,
}
ENCODER = {
    "vocab_size": 30,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 12,
}
GPT2 = {"vocab_size": 30, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 12}
LLAMA = {**ENCODER, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
LLAMA3 = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
PAD = {"pad_token_id": 0}

# name of the class -> name of its config's class, and the config
CASES = {
    "CLIPModel": (
        "CLIPConfig",
        {"vision_config": VISION, "text_config": TEXT, "projection_dim": 6},
    ),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", VISION),
    "CLIPVisionModel": ("CLIPVisionConfig", VISION),
    "CLIPTextModelWithProjection": ("CLIPTextConfig", TEXT),
    "Dinov2Model": (
        "Dinov2Config",
        {
            **{k: v for k, v in VISION.items() if "dim" not in k and "inter" not in k},
            "mlp_ratio": 3,
        },
    ),
    "BertModel": ("BertConfig", ENCODER),
    "BertForMaskedLM": ("BertConfig", ENCODER),
    "BertForSequenceClassification": ("BertConfig", {**ENCODER, "num_labels": 3}),
    "RobertaModel": ("RobertaConfig", ENCODER),
    "RobertaForMaskedLM": ("RobertaConfig", ENCODER),
    "RobertaForSequenceClassification": (
        "RobertaConfig",
        {**ENCODER, "num_labels": 1, "layer_norm_eps": 1e-5, "type_vocab_size": 1},
    ),
    "GPT2Model": ("GPT2Config", GPT2),
    "GPT2LMHeadModel": ("GPT2Config", {**GPT2, "n_inner": 20}),
    "GPT2ForSequenceClassification": ("GPT2Config", {**GPT2, **PAD, "num_labels": 3}),
    "LlamaModel": ("LlamaConfig", LLAMA),
    "LlamaForCausalLM": ("LlamaConfig", {**LLAMA, "rope_parameters": LLAMA3, "head_dim": 6}),
    "LlamaForSequenceClassification": ("LlamaConfig", {**LLAMA, **PAD, "num_labels": 3}),
    "Qwen2Model": ("Qwen2Config", LLAMA),
    "Qwen2ForCausalLM": ("Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "Qwen2ForSequenceClassification": ("Qwen2Config", {**LLAMA, **PAD, "num_labels": 3}),
}


@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def save(hf, folder, name):
    """Saves a tiny model of random weights as transformers does, and returns it."""
    import torch

    config, keys = CASES[name]
    torch.manual_seed(0)
    model = getattr(hf, name)(getattr(hf, config)(**keys)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


def make_batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 29, (3, 7)).astype(np.int32)
    mask = (np.arange(7) < np.array([7, 3, 5])[:, None]).astype(np.int32)
    ids[np.arange(3), mask.sum(1) - 1] = 29  # the end-of-text token
    return {
        "input_ids": np.where(mask, ids, 0).astype(np.int32),
        "attention_mask": mask,
        "image": rng.normal(size=(2, 8, 8, 3)).astype(np.float32),
    }


def torch_output(model, batch):
    """What the model's own forward pass says, in the form that `our_output` has."""
    import torch

    name = type(model).__name__
    ids, mask = (torch.tensor(batch[key]).long() for key in ("input_ids", "attention_mask"))
    if "Roberta" in name:
        ids = torch.where(mask > 0, ids, 1)
    images = torch.tensor(batch["image"].transpose(0, 3, 1, 2))
    keys = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        if name == "CLIPModel":
            return model(pixel_values=images, **keys).logits_per_image.numpy()
        if name == "CLIPVisionModelWithProjection":
            return model(pixel_values=images).image_embeds.numpy()
        if name in ("CLIPVisionModel", "Dinov2Model"):
            return model(pixel_values=images).pooler_output.numpy()
        if name == "CLIPTextModelWithProjection":
            return model(**keys).text_embeds.numpy()
        if name.endswith("ForMaskedLM"):
            model, name = model.base_model, "Model"
        got = model(**keys)
    if name.endswith("Model") and "LMHead" not in name:
        return got.last_hidden_state.numpy()
    return got.logits.numpy()


def our_output(loaded, batch):
    language_models = ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM")
    method = "lm_logits" if loaded.architecture.name in language_models else None
    run = jax.jit(lambda params: loaded.model.apply({"params": params}, batch, method=method))
    got = run(loaded.params)
    return got.pooled if isinstance(got, models.Features) else got


def compare(loaded, model, batch):
    got, want = our_output(loaded, batch), torch_output(model, batch)
    mask = batch["attention_mask"]
    if want.ndim == 3 and np.ndim(got) == 2:  # hidden states, and a vector pooled from them
        last = not isinstance(loaded.model, models.Bert)
        end = want[np.arange(len(want)), mask.sum(1) - 1]
        want = end if last else (want * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]
    elif want.ndim == 3:
        got, want = np.asarray(got)[mask > 0], want[mask > 0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.abs(want).max() > 0.05


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_loads_and_exports(hf, tmp_path, name):
    keys = CASES[name][1]
    model = save(hf, tmp_path / "in", name)
    batch = make_batch()
    loaded = architectures.load(tmp_path / "in")
    assert loaded.architecture.name == name.replace("ForMaskedLM", "Model")
    compare(loaded, model, batch)

    loaded_with_config = (loaded.model, loaded.params, loaded.architecture, loaded.hf_config)
    export(tmp_path / "out", *loaded_with_config)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
    }
    back = getattr(hf, loaded.architecture.name).from_pretrained(tmp_path / "out").eval()
    want = torch_output(model, batch)
    np.testing.assert_allclose(torch_output(back, batch), want, rtol=0, atol=1e-6)
    ours = convert.to_torch(loaded.params, loaded.architecture.table(loaded.model))
    source = safetensors.numpy.load_file(tmp_path / "in" / "model.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == ours.keys()
    for key, x in written.items():
        same = next(
            (
                k
                for k in (key, key.split(".", 1)[-1], f"{model.base_model_prefix}.{key}")
                if k in source
            ),
            None,
        )
        assert same is not None and source[same].tobytes() == x.tobytes(), key

    # without the source's config, what it says is complete
    export(tmp_path / "new", *loaded_with_config[:3])
    again = architectures.load(tmp_path / "new")
    assert again.model == loaded.model
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    padding = PAD if name.endswith("ForSequenceClassification") and "pad_token_id" in keys else {}
    back = type(back).from_pretrained(tmp_path / "new", **padding).eval()
    np.testing.assert_allclose(torch_output(back, batch), want, rtol=0, atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_defaults_are_those_of_transformers(hf, name):
    config, keys = CASES[name]
    entry = architectures.ARCHITECTURES[name.replace("ForMaskedLM", "Model")]
    default = getattr(hf, config)()
    bare = entry.from_hf({"model_type": entry.model_type})
    assert entry.from_hf(default.to_dict()) == bare == entry.from_hf(default.to_diff_dict())
    # and what we write is read by transformers as what we meant
    model = entry.from_hf(getattr(hf, config)(**keys).to_dict())
    assert model != bare
    written = json.loads(json.dumps(entry.to_hf(model)))
    assert (
        entry.from_hf(getattr(hf, config)(**written).to_dict()) == model == entry.from_hf(written)
    )


@pytest.mark.torch
def test_a_head_is_read_past_when_it_is_not_wanted(hf, tmp_path):
    batch = make_batch()
    for name in (
        "BertForSequenceClassification",
        "GPT2ForSequenceClassification",
        "LlamaForCausalLM",
    ):
        model = save(hf, tmp_path / name, name)
        loaded = architectures.load(tmp_path / name, head="none")
        assert loaded.architecture.name.endswith("Model")
        compare(loaded, model.base_model, batch)


@pytest.mark.torch
def test_dtypes_sharding_options_and_stacked_blocks(hf, tmp_path):
    model = save(hf, tmp_path / "in", "BertForSequenceClassification")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    half = architectures.load(tmp_path / "in", param_dtype=jnp.bfloat16, sharding=sharding)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(half.params))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(half.params))
    export(tmp_path / "half", half.model, half.params, half.architecture)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"

    stacked = architectures.load(tmp_path / "in", options={"scan": True})
    assert "blocks" in stacked.params["backbone"]
    compare(stacked, model, make_batch())
    export(tmp_path / "out", stacked.model, stacked.params, stacked.architecture)
    want = safetensors.numpy.load_file(tmp_path / "in" / "model.safetensors")
    got = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.keys() and all(
        got[k].tobytes() == x.tobytes() for k, x in want.items()
    )


def random_params(model):
    rng = np.random.default_rng(0)
    expected = models.expected_params(model)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), expected)


def test_dinov2_at_another_image_size(tmp_path):
    entry = architectures.ARCHITECTURES["Dinov2Model"]
    model = entry.from_hf(CASES["Dinov2Model"][1])
    export(tmp_path, model, random_params(model), entry)
    got = architectures.load(tmp_path, options={"image_size": 20})
    assert got.model.config.image_size == 20
    want = vit.dinov2_from_tensors(Snapshot(tmp_path), got.model.config)
    jax.tree.map(np.testing.assert_array_equal, got.params, want)
    assert got.params["position_embedding"]["embedding"].shape == (26, 12)


def tiny(tmp_path, **keys):
    config = {"model_type": "bert", "architectures": ["BertModel"], **ENCODER, **keys}
    entry = architectures.ARCHITECTURES["BertModel"]
    model = entry.from_hf(config)
    params = random_params(model)
    export(tmp_path, model, params, entry, config)
    return model, params


def test_export_keeps_what_the_source_says_and_replaces_what_it_wrote(tmp_path):
    for _ in range(2):
        tiny(tmp_path, id2label={"0": "no", "1": "yes"}, torch_dtype="float16", bos_token_id=7)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"} and config["bos_token_id"] == 7
    assert config["dtype"] == "float32" and "torch_dtype" not in config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_labels_that_do_not_fit_are_replaced(tmp_path):
    entry = architectures.ARCHITECTURES["BertForSequenceClassification"]
    model = entry.from_hf({**ENCODER, "id2label": {"0": "a", "1": "b", "2": "c"}})
    assert model.num_labels == 3
    params = random_params(model)
    export(tmp_path, model, params, entry, {"id2label": {"0": "x", "1": "y"}})
    got = architectures.load(tmp_path)
    assert got.model == model and got.hf_config["label2id"] == {
        "LABEL_0": 0,
        "LABEL_1": 1,
        "LABEL_2": 2,
    }


def test_a_broken_snapshot_names_its_folder_and_all_that_is_wrong(tmp_path):
    tiny(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {**ENCODER, "model_type": "bert", "num_hidden_layers": 1, "intermediate_size": 21}
        )
    )
    with pytest.raises(ValueError) as error:
        architectures.load(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{tmp_path}: cannot convert to BERT: ")
    assert "extra: encoder.layer.1." in text and "shape [20, 12], expected [21, 12]" in text
    with pytest.raises(ValueError, match="unexpected keyword argument 'colour'"):
        architectures.load(tmp_path, options={"colour": 3})
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        architectures.load(tmp_path)


def test_what_our_models_lack_is_an_error():
    for name, keys, message in (
        ("BertModel", {"hidden_act": "relu", "is_decoder": True}, "hidden_act.*; is_decoder=True"),
        ("BertModel", {"hidden_size": "768"}, "hidden_size='768'"),
        ("BertModel", {"hidden_size": True}, "hidden_size=True"),
        ("BertModel", {"hidden_size": None}, "hidden_size=None"),
        ("BertModel", {"position_embedding_type": "relative_key"}, "only 'absolute'"),
        ("Dinov2Model", {"use_swiglu_ffn": True}, "use_swiglu_ffn=True: only False"),
        ("Dinov2Model", {"mlp_ratio": "4"}, "mlp_ratio='4'"),
        ("GPT2Model", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("LlamaModel", {"attention_bias": True, "mlp_bias": True}, "attention_bias=.*; mlp_bias"),
        ("LlamaModel", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ("LlamaModel", {"rope_scaling": {"rope_type": "llama3"}}, "lacks factor, low_freq_factor"),
        ("LlamaModel", {"rope_theta": "1"}, "rope_theta='1'"),
        ("Qwen2Model", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("Qwen2Model", {"layer_types": ["sliding_attention"]}, "only 'full_attention'"),
        ("QWenLMHeadModel", {"rotary_pct": 0.5}, "rotary_pct=0.5"),
        ("BertForSequenceClassification", {"id2label": {}}, "expected labels"),
    ):
        with pytest.raises(ValueError, match=message):
            architectures.ARCHITECTURES[name].from_hf(keys)


def test_older_spellings():
    llama = architectures.ARCHITECTURES["LlamaForCausalLM"]
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    want = llama.from_hf({**LLAMA, "rope_parameters": LLAMA3})
    assert llama.from_hf({**LLAMA, "rope_theta": 500.0, "rope_scaling": scaling}) == want
    assert want.config.rope_theta == 500 and want.config.rope_scaling.factor == 4
    clip = architectures.ARCHITECTURES["CLIPModel"]
    new = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 6}
    old = {"vision_config_dict": VISION, "text_config_dict": TEXT, "projection_dim": 6}
    assert clip.from_hf(old) == clip.from_hf({**old, "text_config": None}) == clip.from_hf(new)


def test_the_presets_are_what_the_published_configs_say():
    of = architectures.ARCHITECTURES
    assert (
        of["RobertaModel"]
        .from_hf(
            {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
            pool="cls",
        )
        .config
        == models.ROBERTA_BASE
    )
    assert of["GPT2Model"].from_hf({}).config == models.GPT2
    assert of["CLIPModel"].from_hf({}) == models.CLIP_MODEL_B32
    large = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "patch_size": 14,
    }
    text = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    assert (
        of["CLIPModel"].from_hf(
            {"vision_config": large, "text_config": text, "projection_dim": 768}
        )
        == models.CLIP_MODEL_L14
    )
    qwen = {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "intermediate_size": 27392,
        "seq_length": 2048,
        "vocab_size": 152064,
    }
    assert of["QWenLMHeadModel"].from_hf(qwen).config == models.QWEN_14B


def test_the_first_qwen_round_trip(tmp_path):
    keys = {
        "model_type": "qwen",
        "architectures": ["QWenLMHeadModel"],
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 40,
        "vocab_size": 30,
        "seq_length": 12,
    }
    entry = architectures.identify(keys)
    model = entry.from_hf(keys)
    assert model.config.mlp_dim == 20 and model.config.qkv_bias
    params = random_params(model)
    export(tmp_path, model, params, entry, keys)
    got = architectures.load(tmp_path)
    assert got.model == model
    want = tree.flatten(params)
    assert all(np.array_equal(x, want[name]) for name, x in tree.flatten(got.params).items())
    names = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert names["transformer.h.1.attn.c_attn.weight"].shape == (48, 16)


def test_identify():
    identify = architectures.identify
    assert identify({"model_type": "clip"}).name == "CLIPModel"
    assert identify({"architectures": ["GPT2LMHeadModel"]}).name == "GPT2LMHeadModel"
    assert identify({"architectures": ["Odd", "BertForMaskedLM"]}).name == "BertModel"
    classifier = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    assert identify(classifier).name == "BertForSequenceClassification"
    assert identify(classifier, head="none").name == "BertModel"
    other = {"model_type": "bert", "architectures": ["BertForQuestionAnswering"]}
    assert identify(other, head="none").name == "BertModel"
    for config in (
        other,
        {},
        {"model_type": "t5"},
        {"model_type": ["bert"]},
        {"architectures": [3]},
        {"model_type": "mpnet", "architectures": ["BertModel"]},
    ):
        with pytest.raises(ValueError, match="expected one of BertForMaskedLM, BertForPreTraining"):
            identify(config)
    with pytest.raises(ValueError, match="head='lm': expected"):
        identify(classifier, head="lm")
