"""The check of checkpoints from headers, as a program."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny_snapshots import clip_snapshots, roberta_snapshots

import retex_jax as rtx
from retex_jax import lora, models
from retex_jax.convert import __main__ as program
from retex_jax.convert import hub, inspection
from retex_jax.convert.architectures import ARCHITECTURES
from retex_jax.convert.export import export


def decoder(folder, **changes):
    config = models.DecoderConfig(
        **{
            "vocab_size": 20,
            "width": 8,
            "num_layers": 1,
            "num_heads": 2,
            "mlp_dim": 12,
            "max_length": 10,
            "lm_head": "tied",
            **changes,
        }
    )
    model = models.Decoder(config)
    params = models.init_params(model, jax.random.key(0))
    export(folder, model, params, ARCHITECTURES["LlamaForCausalLM"])


def test_towers_fit_the_clip_that_they_are_of(tmp_path, capsys):
    clip_snapshots(tmp_path, ("owner/a", "owner/b"))
    paths = [str(tmp_path / "owner" / name) for name in ("base", "a", "b")]
    assert program.main(["--check", *paths]) == 0
    printed = capsys.readouterr().out
    assert "everything fits" in printed
    for said in ("CLIPModel", "CLIPVisionModel", "float32 x", "merging 2 experts"):
        assert said in printed
    with pytest.raises(ValueError, match="do not fit") as error:
        rtx.ExpertSet.from_safetensors(paths[0], paths[1:2])
    refused = len(str(error.value).splitlines()) - 1
    assert f"reads raw names and finds {refused} missing, extra or different" in printed


def test_classifiers_fit_a_base_without_a_head(tmp_path, capsys):
    roberta_snapshots(tmp_path)
    paths = [str(tmp_path / name) for name in ("base", "first", "second")]
    assert program.main(["--check", *paths]) == 0
    printed = capsys.readouterr().out
    assert "RobertaForSequenceClassification" in printed
    assert printed.count("missing leaf embeddings/LayerNorm/bias (did you mean 'roberta/") == 2


def test_one_leaf_of_another_dtype_is_named(tmp_path, capsys):
    roberta_snapshots(tmp_path)
    path, key = tmp_path / "first/model.safetensors", "roberta.encoder.layer.0.output.dense.bias"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, key: tensors[key].astype(np.float16)}, path)
    assert program.main(["--check", str(tmp_path / "base"), str(tmp_path / "first")]) == 1
    printed = capsys.readouterr().out
    assert "bias: dtype float16, expected float32" in printed
    assert "1 problem(s)" in printed


def files(folder):
    """A base without config.json, an expert of it, and one that does not fit."""
    base = {
        "dense.weight": np.ones((4, 3), np.float32),
        "dense.bias": np.ones(4, np.float32),
        "norm.scale": np.ones(4, np.float32),
    }
    wrong = {
        "dense.wieght": base["dense.weight"],
        "dense.bias": np.ones(5, np.float32),
        "norm.scale": np.ones(4, np.float16),
    }
    paths = []
    for classes, (name, leaves) in enumerate({"base": base, "good": base, "wrong": wrong}.items()):
        tensors = {**leaves, "classifier.weight": np.ones((classes + 1, 4), np.float32)}
        paths.append(str(folder / f"{name}.safetensors"))
        safetensors.numpy.save_file(tensors, paths[-1])
    return paths


def test_files_without_config_are_compared_by_name(tmp_path, capsys):
    base, good, _ = files(tmp_path)
    assert program.main(["--check", base, base]) == 0
    capsys.readouterr()
    assert program.main(["--check", base, good]) == 1
    printed = capsys.readouterr().out
    assert f"{good}: classifier/weight has shape (2, 4), expected (1, 4)" in printed
    assert program.main(["--check", base, good, "--exclude", "^classifier"]) == 0
    printed = capsys.readouterr().out
    for said in (f"{good}: no config.json", "merging 1 experts", "everything fits"):
        assert said in printed


def test_files_do_not_fit_where_the_expert_set_says_so(tmp_path, capsys):
    base, _, wrong = files(tmp_path)
    with pytest.raises(ValueError, match="do not fit") as error:
        rtx.ExpertSet.from_safetensors(base, [wrong], exclude=["^classifier"])
    problems = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert len(problems) == 4
    assert program.main(["--check", base, wrong, "--exclude", "^classifier"]) == 1
    printed = capsys.readouterr().out
    for problem in problems:
        assert problem.replace("wrong:", f"{wrong}:") in printed
    assert "4 problem(s)" in printed


@pytest.mark.parametrize("name", ["absent.safetensors", "a/absent.safetensors", "./absent"])
def test_misspelt_path_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(hub, "_import", lambda problem: pytest.fail("asks the hub"))
    (problem,) = inspection.inspect(name).problems
    assert "no such file or folder" in problem


def test_exclude_names_what_is_no_pattern(capsys):
    with pytest.raises(SystemExit):
        program.main(["--check", "base", "--exclude", "(classifier"])
    assert "exclude: got '(classifier', expected a regular" in capsys.readouterr().err


def test_every_disagreement_is_said(tmp_path, capsys):
    decoder(tmp_path / "base")
    decoder(tmp_path / "resized", vocab_size=24)
    decoder(tmp_path / "untied", lm_head="untied")
    decoder(tmp_path / "half", param_dtype="bfloat16")
    names = ("base", "resized", "untied", "half", "absent")
    assert program.main(["--offline", "--check", *(str(tmp_path / name) for name in names)]) == 1
    printed = capsys.readouterr().out
    assert "token_embedding/embedding: shape (24, 8), expected (20, 8) (the vocabulary" in printed
    assert "untied: its output layer is untied from the embedding" in printed
    assert "untied: lm_head/kernel: not in the pretrained model" in printed
    assert "half: stored in bfloat16, expected float32" in printed
    assert "absent" in printed
    assert "5 problem(s)" in printed


def test_what_is_missing_is_named_with_the_nearest_name(tmp_path):
    decoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    (problem,) = inspection.inspect(tmp_path).problems
    assert "missing: model.layers.1.self_attn.q_proj.weight" in problem
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gru"}))
    assert "expected one of" in inspection.inspect(tmp_path).problems[0]
    (tmp_path / "config.json").unlink()
    assert inspection.inspect(tmp_path).problems == ()


def test_adapter_is_checked_against_the_base(tmp_path, capsys):
    roberta_snapshots(tmp_path)
    module = "base_model.model.roberta.encoder.layer.0.output.dense"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["dense"]}
    factors = {
        f"{module}.lora_A.weight": np.ones((2, 24), np.float32),
        f"{module}.lora_B.weight": np.ones((16, 2), np.float32),
    }
    lora.save_adapter(tmp_path / "fits", factors, config)
    assert program.main(["--check", str(tmp_path / "base"), str(tmp_path / "fits")]) == 0
    assert "a LoRA adapter" in capsys.readouterr().out
    factors[f"{module}.lora_A.weight"] = np.ones((2, 23), np.float32)
    lora.save_adapter(tmp_path / "wrong", factors, config)
    assert program.main(["--check", str(tmp_path / "base"), str(tmp_path / "wrong")]) == 1
    assert "expected A [2, inputs]" in capsys.readouterr().out


def test_repository_is_asked_for_its_headers_only(tmp_path, monkeypatch):
    decoder(tmp_path / "base")
    there = inspection.inspect(tmp_path / "base")
    asked = []

    def header(repository, revision):
        asked.append((repository, revision))
        config = json.loads((tmp_path / "base/config.json").read_text())
        return hub.Header(dict(there.specs), config)

    def find(repository, root, revision, offline):
        assert offline
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(hub, "find", find)
    monkeypatch.setattr(hub, "header", header)
    found = inspection.inspect("owner/name", revision="abc")
    assert asked == [("owner/name", "abc")]
    assert found.leaves == there.leaves
    assert found.tied is True


def test_memory_of_a_merge_counts_the_model_and_the_largest_stack():
    leaves = {
        "a": jax.ShapeDtypeStruct((10, 3), np.float16),
        "b": jax.ShapeDtypeStruct((5,), np.float32),
    }
    assert inspection.merge_bytes(leaves, num_tasks=4) == 60 + 20 + 4 * 30 * (2 * 4 + 1)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    assert stopped.value.code == 0
    assert "--check PRETRAINED EXPERT" in capsys.readouterr().out
