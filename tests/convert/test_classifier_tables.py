"""Tests of the tables of BERT's and RoBERTa's classifiers: round trips, and parity with torch."""

import dataclasses
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from retex_jax import convert, models, tree

BERT = models.BertConfig(
    vocab_size=30, width=12, num_layers=2, num_heads=2, mlp_dim=20, max_length=8, pool="cls"
)
ROBERTA = dataclasses.replace(BERT, num_token_types=1, padding_idx=1, layer_norm_eps=1e-5)
TABLES = {
    "bert": (BERT, convert.BERT, convert.BERT_CLASSIFIER),
    "roberta": (ROBERTA, convert.ROBERTA, convert.ROBERTA_CLASSIFIER),
}


def random_params(model):
    rng = np.random.default_rng(0)
    expected = models.expected_params(model)
    return jax.tree.map(lambda p: (0.4 * rng.normal(size=p.shape)).astype(p.dtype), expected)


def classifier(kind, num_labels=3):
    return models.SequenceClassifier(models.Bert(TABLES[kind][0]), num_labels, kind)


def make_batch(vocab_size, lengths):
    longest = max(lengths)
    ids = np.random.default_rng(0).integers(3, vocab_size, (len(lengths), longest))
    mask = np.arange(longest) < np.array(lengths)[:, None]
    ids = np.where(mask, ids, 1)  # RoBERTa's padding
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}


def assert_same_bytes(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype), name
        assert got[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("kind", TABLES)
def test_classifier_round_trip(kind):
    model = classifier(kind)
    params, table = random_params(model), TABLES[kind][2]
    tensors = convert.to_torch(params, table)
    last = "classifier.weight" if kind == "bert" else "classifier.out_proj.weight"
    assert tensors[last].shape == (3, 12)
    assert tensors[f"{kind}.encoder.layer.1.intermediate.dense.weight"].shape == (20, 12)
    source = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): x for name, x in tensors.items()}
    source[f"{kind}.embeddings.position_ids"] = np.arange(8)[None]
    back = convert.to_flax(source, table, models.expected_params(model))
    assert_same_bytes(tree.flatten(back), tree.flatten(params))


@pytest.mark.parametrize("kind", TABLES)
def test_a_backbone_reads_past_what_it_does_not_have(kind):
    config, table, _ = TABLES[kind]
    params = random_params(models.Bert(config))
    tensors = {f"{kind}.{k}": x for k, x in convert.to_torch(params, table).items()}
    tensors[f"{kind}.pooler.dense.weight"] = np.zeros((12, 12), np.float32)
    tensors[f"{kind}.embeddings.position_ids"] = np.arange(8)[None]
    pretraining = "cls.predictions.bias" if kind == "bert" else "lm_head.bias"
    tensors[pretraining] = np.zeros(30, np.float32)
    expected = models.expected_params(models.Bert(config))
    got = convert.to_flax(tensors, table, expected)
    assert_same_bytes(tree.flatten(got), tree.flatten(params))
    # The head of a fine-tuned model is not dropped in silence.
    tensors["classifier.dense.weight"] = np.zeros((12, 12), np.float32)
    with pytest.raises(ValueError, match=r"1 problem\(s\)\n  extra: classifier\.dense\.weight"):
        convert.to_flax(tensors, table, expected)


def test_a_classifier_without_its_head():
    tensors = convert.to_torch(random_params(classifier("bert")), convert.BERT_CLASSIFIER)
    del tensors["bert.pooler.dense.bias"]
    expected = models.expected_params(classifier("bert"))
    with pytest.raises(ValueError, match=r"missing: bert\.pooler\.dense\.bias \(for head/pooler"):
        convert.to_flax(tensors, convert.BERT_CLASSIFIER, expected)


def test_a_roberta_file_may_hold_an_unused_pooler():
    model = classifier("roberta")
    params = random_params(model)
    tensors = convert.to_torch(params, convert.ROBERTA_CLASSIFIER)
    tensors["roberta.pooler.dense.bias"] = np.zeros(12, np.float32)
    got = convert.to_flax(tensors, convert.ROBERTA_CLASSIFIER, models.expected_params(model))
    assert_same_bytes(tree.flatten(got), tree.flatten(params))


@pytest.fixture(scope="module")
def hugging_face():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    bert = pytest.importorskip("transformers.models.bert")
    roberta = pytest.importorskip("transformers.models.roberta")
    return torch, {
        "bert": (bert.BertConfig, bert.BertModel, bert.BertForSequenceClassification),
        "roberta": (
            roberta.RobertaConfig,
            roberta.RobertaModel,
            roberta.RobertaForSequenceClassification,
        ),
    }


def torch_config(make, config, **options):
    return make(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        max_position_embeddings=config.position_rows,
        type_vocab_size=config.num_token_types,
        layer_norm_eps=config.layer_norm_eps,
        **options,
    )


def noisy(model, torch, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def read_back(model, folder):
    """The tensors as transformers writes them to a file."""
    model.save_pretrained(folder)
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.torch
@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("kind", TABLES)
def test_classifier_equals_transformers(hugging_face, tmp_path, kind, num_labels):
    torch, classes = hugging_face
    make_config, _, make_model = classes[kind]
    config, _, table = TABLES[kind]
    model = noisy(make_model(torch_config(make_config, config, num_labels=num_labels)), torch)
    tensors = read_back(model, tmp_path)
    ours = classifier(kind, num_labels)
    params = convert.to_flax(tensors, table, models.expected_params(ours))
    assert_same_bytes(convert.to_torch(params, table), tensors)
    batch = make_batch(30, [8, 3, 5])
    if kind == "bert":
        batch["token_type_ids"] = np.random.default_rng(1).integers(0, 2, (3, 8)).astype(np.int32)
    with torch.no_grad():
        want = model(**{name: torch.tensor(x).long() for name, x in batch.items()}).logits
    got = ours.apply({"params": params}, batch)
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-5)


@pytest.mark.torch
def test_roberta_equals_transformers(hugging_face, tmp_path):
    torch, classes = hugging_face
    make_config, make_model, _ = classes["roberta"]
    model = make_model(torch_config(make_config, ROBERTA), add_pooling_layer=False)
    tensors = read_back(noisy(model, torch), tmp_path)
    expected = models.expected_params(models.Bert(ROBERTA))
    params = convert.to_flax(tensors, convert.ROBERTA, expected)
    assert_same_bytes(convert.to_torch(params, convert.ROBERTA), tensors)
    batch = make_batch(30, [8, 3, 5])
    with torch.no_grad():
        arguments = {name: torch.tensor(x).long() for name, x in batch.items()}
        hidden = model(**arguments, output_hidden_states=True).hidden_states[1:]
    got = models.Bert(ROBERTA).apply({"params": params}, batch)
    mask = batch["attention_mask"][:, :, None]
    for i, states in enumerate(hidden):
        want = (states.numpy() * mask).sum(1) / mask.sum(1)
        np.testing.assert_allclose(got.layers[i], want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.pooled, hidden[-1].numpy()[:, 0], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.torch
def test_roberta_base_equals_transformers(hugging_face):
    torch, classes = hugging_face
    make_config, _, make_model = classes["roberta"]
    torch.manual_seed(0)
    model = make_model(torch_config(make_config, models.ROBERTA_BASE, num_labels=3)).eval()
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    ours = models.SequenceClassifier(models.Bert(models.ROBERTA_BASE), 3, "roberta")
    params = convert.to_flax(tensors, convert.ROBERTA_CLASSIFIER, models.expected_params(ours))
    assert_same_bytes(convert.to_torch(params, convert.ROBERTA_CLASSIFIER), tensors)
    batch = make_batch(50265, [128, 40, 7])
    with torch.no_grad():
        want = model(**{name: torch.tensor(x).long() for name, x in batch.items()}).logits.numpy()
    got = jax.jit(lambda p, b: ours.apply({"params": p}, b))(params, batch)
    print(f"largest difference of logits {np.abs(got - want).max():.2g}")  # shown by -s
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
