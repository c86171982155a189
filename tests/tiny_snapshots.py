"""Hugging Face snapshots of tiny models with random weights, written by this package."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from retex_jax import models
from retex_jax.convert.architectures import ARCHITECTURES
from retex_jax.convert.export import export

TOWERS = tuple(f"owner/{name}" for name in tiny.NAMES)
WORDS = [
    "[PAD]",
    "[UNK]",
    "[EOS]",
    *["a", "photo", "of", "class", "0", "1", "2", ".", "red", "green", "blue"],
]


def tokenizer(folder, eos=True):
    """A tokenizer of a few words that ends each text with [EOS]."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", 2)]
    )
    made.save(str(folder / "tokenizer.json"))


def shifted(params, seed, size=0.05):
    """Parameters with noise, as a fine-tuned model's."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        structure, [np.asarray(x) + size * rng.normal(size=x.shape).astype("f4") for x in leaves]
    )


def clip_snapshots(root, towers=TOWERS, base="owner/base"):
    """A tiny CLIP, and vision towers beside it."""
    vision = dataclasses.replace(
        models.CLIP_B32,
        image_size=8,
        patch_size=4,
        width=16,
        num_layers=2,
        num_heads=2,
        mlp_dim=24,
        projection_dim=12,
    )
    text = models.ClipTextConfig(
        vocab_size=len(WORDS),
        width=16,
        num_layers=1,
        num_heads=2,
        mlp_dim=16,
        projection_dim=12,
        eos_token_id=2,
    )
    text = dataclasses.replace(text, eos_token_id=WORDS.index("[EOS]"))
    clip = models.Clip(vision, text)
    params = models.init_params(clip, jax.random.key(0))
    params = {**params, "logit_scale": np.float32(2.0)}
    export(root / base, clip, params, ARCHITECTURES["CLIPModel"])
    tokenizer(root / base)
    tower = {name: leaf for name, leaf in params["vision"].items() if name != "projection"}
    model = models.ViT(dataclasses.replace(vision, projection_dim=None))
    for seed, name in enumerate(towers):
        export(root / name, model, shifted(tower, seed), ARCHITECTURES["CLIPVisionModel"])
    return clip, params


ROBERTA = models.BertConfig(
    vocab_size=len(WORDS),
    width=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=24,
    max_length=16,
    num_token_types=1,
    padding_idx=0,
    pool="cls",
    layer_norm_eps=1e-5,
)


def roberta_snapshots(root):
    """A base and two classifiers of 3 and of 2 classes; their parameters by folder."""
    base = models.init_params(models.Bert(ROBERTA), jax.random.key(0))
    export(root / "base", models.Bert(ROBERTA), base, ARCHITECTURES["RobertaModel"])
    tokenizer(root / "base")
    made = {}
    for name, classes in (("first", 3), ("second", 2)):
        model = models.SequenceClassifier(models.Bert(ROBERTA), classes, "roberta")
        head = models.init_params(model, jax.random.key(classes))["head"]
        params = {"backbone": shifted(base, classes), "head": shifted(head, classes)}
        architecture = ARCHITECTURES["RobertaForSequenceClassification"]
        export(root / name, model, params, architecture)
        made[name] = (model, params)
    return base, made


def kill_at(monkeypatch, module, name, number):
    """Ends a program by KeyboardInterrupt at one call of a module's function; gives the arguments of all calls."""
    real, calls = getattr(module, name), []

    def killed(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, name, killed)
    return calls
