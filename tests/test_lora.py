"""LoRA adapters read as experts and offsets written as adapters, in hand-made folders."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import retex_jax as rtx
from retex_jax import lora, offsets, tree
from retex_jax.sources import SafetensorsSource, TreeSource

RNG = np.random.default_rng(0)
PREFIX = "base_model.model."


def normal(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


BASE = {
    "model.up.weight": normal(5, 3),
    "model.up.bias": normal(5),
    "model.square.weight": normal(4, 4),
    "model.embed.weight": normal(7, 3),
    "model.conv.weight": normal(6, 2, 3, 3),
    "model.norm.weight": normal(3),
    "model.steps": np.arange(3),
}
SHAPES = {"up": ((2, 3), (5, 2)), "square": ((2, 4), (4, 2)), "conv": ((2, 2, 3, 3), (6, 2, 1, 1))}


def base(tensors=BASE):
    return TreeSource(tree.unflatten({key.replace(".", "/"): x for key, x in tensors.items()}))


def factors(*modules, **shapes):
    """Factors of "model.<module>", with the keys that PEFT writes."""
    tensors = {}
    for module in modules:
        for side, shape in zip("AB", SHAPES[module], strict=True):
            tensors[f"{PREFIX}model.{module}.lora_{side}.weight"] = normal(*shape)
    return tensors


def write(folder, tensors, config=None, **fields):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields} if config is None else config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def product(tensors, module):
    a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
    return np.einsum("or,ri->oi", np.float64(b.reshape(*b.shape[:2])), a.reshape(len(a), -1))


def test_leaves_are_sums(tmp_path):
    tensors = factors("up", "conv")
    source = lora.LoraSource(write(tmp_path, tensors, base_model_name_or_path="x/y"), base())
    assert source.leaves == base().leaves
    assert source.base_model == "x/y"
    assert source.name == tmp_path.name
    assert source.extra == {}
    up = BASE["model.up.weight"] + 2 * product(tensors, "model.up")
    conv = BASE["model.conv.weight"] + 2 * product(tensors, "model.conv").reshape(6, 2, 3, 3)
    np.testing.assert_allclose(source.read("model/up/weight"), up, rtol=0, atol=1e-5)
    np.testing.assert_allclose(source.read("model/conv/weight"), conv, rtol=0, atol=1e-5)
    for name in ("square/weight", "up/bias", "norm/weight", "steps"):
        key = f"model.{name.replace('/', '.')}"
        np.testing.assert_array_equal(source.read(f"model/{name}"), BASE[key])
    np.testing.assert_array_equal(BASE["model.up.weight"], base().read("model/up/weight"))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_sums_are_float32_or_wider(tmp_path, dtype):
    tensors = {key: x.astype(np.float32) for key, x in factors("up").items()}
    weights = BASE["model.up.weight"].astype(dtype)
    source = lora.LoraSource(write(tmp_path, tensors), base({"model.up.weight": weights}))
    found = source.read("model/up/weight")
    assert found.dtype == dtype
    # Products of small numbers are summed before they are rounded to the leaf's dtype, once.
    wide = np.float64 if dtype == np.float64 else np.float32
    a, b = (tensors[f"{PREFIX}model.up.lora_{side}.weight"].astype(wide) for side in "AB")
    np.testing.assert_array_equal(found, ((b * wide(2)) @ a + weights.astype(wide)).astype(dtype))


def test_half_precision_factors(tmp_path):
    tensors = {key: x.astype(ml_dtypes.bfloat16) for key, x in factors("up").items()}
    source = lora.LoraSource(write(tmp_path, tensors), base())
    wide = {key: x.astype(np.float32) for key, x in tensors.items()}
    want = BASE["model.up.weight"] + 2 * product(wide, "model.up")
    np.testing.assert_allclose(source.read("model/up/weight"), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"use_rslora": True}, 4 / np.sqrt(2)),
        ({"alpha_pattern": {"up": 6}}, 3),
        ({"alpha_pattern": {"u.": 6, "up": 8}}, 3),
        ({"alpha_pattern": {"model.up": 6}}, 3),
        ({"alpha_pattern": {"^model.up": 6}}, 3),
        ({"alpha_pattern": {"p": 6, "mode": 6, "el.up": 6}}, 2),
        ({"r": 16, "rank_pattern": {r"model\.u[a-z]": 2}}, 2),
        ({"lora_alpha": 5}, 2.5),
    ],
)
def test_scaling(tmp_path, fields, scaling):
    tensors = factors("up")
    source = lora.LoraSource(write(tmp_path, tensors, **fields), base())
    want = BASE["model.up.weight"] + scaling * product(tensors, "model.up")
    np.testing.assert_allclose(source.read("model/up/weight"), want, rtol=0, atol=1e-5)


def test_embedding(tmp_path):
    tensors = {
        f"{PREFIX}model.embed.lora_embedding_A": normal(2, 7),
        f"{PREFIX}model.embed.lora_embedding_B": normal(3, 2),
    }
    source = lora.LoraSource(write(tmp_path, tensors), base())
    a, b = tensors.values()
    want = BASE["model.embed.weight"] + 2 * np.einsum("re,dr->ed", a, b)
    np.testing.assert_allclose(source.read("model/embed/weight"), want, rtol=0, atol=1e-5)
    # PEFT saves an embedding's own table too, where it may have been resized.
    tensors[f"{PREFIX}model.embed.base_layer.weight"] = normal(7, 3)
    source = lora.LoraSource(write(tmp_path, tensors), base())
    want = want - BASE["model.embed.weight"] + tensors[f"{PREFIX}model.embed.base_layer.weight"]
    np.testing.assert_allclose(source.read("model/embed/weight"), want, rtol=0, atol=1e-5)


def test_weights_stored_as_in_out(tmp_path):
    tensors = factors("up", "square")
    stored = {key: BASE[key].T if "up" in key else BASE[key] for key in BASE if "weight" in key}
    up = stored["model.up.weight"] + 2 * product(tensors, "model.up").T
    straight = stored["model.square.weight"] + 2 * product(tensors, "model.square")
    swapped = stored["model.square.weight"] + 2 * product(tensors, "model.square").T

    def read(leaf, transposed=None, **fields):
        folder = write(tmp_path, tensors, **fields)
        return lora.LoraSource(folder, base(stored), transposed=transposed).read(leaf)

    for transposed, square in [
        (["up", "square"], swapped),
        (["up"], straight),
        ([""], swapped),
    ]:
        found = read("model/square/weight", transposed)
        np.testing.assert_allclose(found, square, rtol=0, atol=1e-5)
        np.testing.assert_allclose(read("model/up/weight", transposed), up, rtol=0, atol=1e-5)
    for leaf, want in [("model/up/weight", up), ("model/square/weight", swapped)]:
        np.testing.assert_allclose(read(leaf, fan_in_fan_out=True), want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="which leaves are stored") as error:
        read("model/square/weight")
    assert "model/square/weight" in str(error.value)
    with pytest.raises(ValueError, match="not what `transposed` says"):
        read("model/square/weight", ["square"])
    with pytest.raises(ValueError, match="expected a sequence of patterns"):
        read("model/square/weight", "square")


def test_full_copies(tmp_path):
    tensors = factors("up") | {
        f"{PREFIX}model.up.base_layer.bias": normal(5),
        f"{PREFIX}model.norm.weight": normal(3).astype(np.float16),
        f"{PREFIX}classifier.dense.weight": normal(2, 3),
        f"{PREFIX}classifier.dense.bias": normal(2),
        # What PEFT writes beside with bias="all"; it does not read these.
        f"{PREFIX}classifier.modules_to_save.task.dense.bias": normal(2),
        f"{PREFIX}classifier.original_module.dense.bias": normal(2),
    }
    folder = write(tmp_path, tensors, modules_to_save=["norm", "classifier"])
    source = lora.LoraSource(folder, base())
    assert {name: spec.shape for name, spec in source.extra.items()} == {
        "classifier/dense/weight": (2, 3),
        "classifier/dense/bias": (2,),
    }
    assert source.leaves == base().leaves
    for name, key in {
        "model/up/bias": "model.up.base_layer.bias",
        "model/norm/weight": "model.norm.weight",
        "classifier/dense/bias": "classifier.dense.bias",
    }.items():
        np.testing.assert_array_equal(source.read(name), tensors[PREFIX + key])
        assert source.read(name).dtype == np.float32
    with_head = base({**BASE, "classifier.dense.weight": normal(2, 3)})
    source = lora.LoraSource(folder, with_head)
    assert list(source.extra) == ["classifier/dense/bias"]
    found = source.read("classifier/dense/weight")
    np.testing.assert_array_equal(found, tensors[f"{PREFIX}classifier.dense.weight"])


def test_only_the_wrapper_has_the_copy(tmp_path):
    tensors = factors("up") | {f"{PREFIX}model.norm.modules_to_save.default.weight": normal(3)}
    source = lora.LoraSource(write(tmp_path, tensors), base())
    (want,) = [x for key, x in tensors.items() if "norm" in key]
    np.testing.assert_array_equal(source.read("model/norm/weight"), want)


@pytest.mark.parametrize(("strip", "add"), [("model.", ""), ("", "clip."), ("model.", "enc.er.")])
def test_prefixes_may_differ(tmp_path, strip, add):
    if strip and add:  # neither a prefix to strip nor one to set
        renamed = {add + key.removeprefix(strip): x for key, x in BASE.items()}
        with pytest.raises(ValueError, match="fits no leaf"):
            lora.LoraSource(write(tmp_path, factors("up")), base(renamed))
        return
    renamed = {add + key.removeprefix(strip): x for key, x in BASE.items()}
    tensors = factors("up", "square") | {
        f"{PREFIX}model.norm.weight": normal(3),
        f"{PREFIX}score.weight": normal(2, 3),
    }
    source = lora.LoraSource(write(tmp_path, tensors, modules_to_save=["score"]), base(renamed))
    name = (add + "model.".removeprefix(strip)).replace(".", "/")
    want = BASE["model.up.weight"] + 2 * product(tensors, "model.up")
    np.testing.assert_allclose(source.read(f"{name}up/weight"), want, rtol=0, atol=1e-5)
    want = tensors[f"{PREFIX}model.norm.weight"]
    np.testing.assert_array_equal(source.read(f"{name}norm/weight"), want)
    assert list(source.extra) == ["score/weight"]


def test_prefix_that_could_be_two(tmp_path):
    two = {f"{tower}.{key}": x for tower in ("text", "vision") for key, x in BASE.items()}
    with pytest.raises(ValueError, match="may be any of the leaves") as error:
        lora.LoraSource(write(tmp_path, factors("up")), base(two))
    for tower in ("text", "vision"):
        assert f"{tower}/model/up/weight" in str(error.value)


REFUSED = {
    "peft_type is 'IA3'": {"peft_type": "IA3"},
    "use_dora is set": {"use_dora": True},
    "layers of Megatron": {"megatron_config": {"x": 1}},
    "lora_bias is set": {"lora_bias": True},
    "trainable_token_indices is set": {"trainable_token_indices": [1]},
    "init_lora_weights is 'pissa'": {"init_lora_weights": "pissa"},
    "bias is 'some'": {"bias": "some"},
    "r is 0": {"r": 0},
    "lora_alpha is 'x'": {"lora_alpha": "x"},
    "alpha_pattern is": {"alpha_pattern": {"(": 1}},
    "rank_pattern is": {"rank_pattern": {"up": 1.5}},
    "modules_to_save is 'norm'": {"modules_to_save": "norm"},
    "says rank 3": {"r": 3},
}


@pytest.mark.parametrize("problem", REFUSED)
def test_refused_configurations(tmp_path, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        lora.LoraSource(write(tmp_path, factors("up"), **REFUSED[problem]), base())


def test_all_problems_at_once(tmp_path):
    tensors = factors("up", "square", "conv")
    del tensors[f"{PREFIX}model.up.lora_B.weight"]
    tensors |= {
        f"{PREFIX}model.square.lora_A.weight": normal(2, 5),
        f"{PREFIX}model.conv.lora_B.weight": normal(6, 2, 2, 1),
        f"{PREFIX}model.upp.lora_A.weight": normal(2, 3),
        f"{PREFIX}model.upp.lora_B.weight": normal(5, 2),
        f"{PREFIX}model.steps.lora_A.weight": normal(2, 3),
        f"{PREFIX}model.steps.lora_B.weight": normal(5, 2),
        f"{PREFIX}model.embed.lora_embedding_A": normal(2, 3),
        f"{PREFIX}model.embed.lora_embedding_B": normal(7, 2),
        f"{PREFIX}model.norm.weight": normal(4),
        f"{PREFIX}model.norm.bias": normal(3),
        f"{PREFIX}model.up.lora_magnitude_vector": normal(5),
        "model.up.bias": normal(5),
    }
    with pytest.raises(ValueError, match="can't be read") as error:
        lora.LoraSource(write(tmp_path, tensors, use_dora=True), base())
    lines = sorted(line.strip() for line in str(error.value).splitlines()[1:])
    expected = [
        "base_model/model/model/up/lora_magnitude_vector: a tensor of no kind",
        "model/conv: lora_A (2, 2, 3, 3) and lora_B (6, 2, 2, 1) for model/conv/weight",
        "model/embed: lora_A (2, 3) and lora_B (7, 2) for model/embed/weight (7, 3): expected",
        "model/norm/bias: fits no leaf",
        "model/norm/weight: has shape (4,), but model/norm/weight has (3,)",
        "model/square: lora_A (2, 5) and lora_B (4, 2) for model/square/weight (4, 4): expected",
        "model/steps: fits no leaf",
        "model/up/bias: a tensor of no kind",
        "model/up: has lora_A and not the other factor",
        "model/upp: fits no leaf of the pretrained model (did you mean 'model/up/weight'?)",
        "use_dora is set",
    ]
    assert len(lines) == len(expected), lines
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


def test_integer_weights_are_refused(tmp_path):
    tensors = {"model.up.weight": np.ones((5, 3), np.int8), "x": normal(2)}
    with pytest.raises(ValueError, match="dtype int8, expected a float"):
        lora.LoraSource(write(tmp_path, factors("up")), base(tensors))


def test_unreadable_folders(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json: not a readable"):
        lora.LoraSource(tmp_path, base())
    folder = write(tmp_path, factors("up"))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        ValueError,
        match=r"(?s)these are pickle files.*weights_only=True.*adapter_model\.safetensors",
    ):
        lora.LoraSource(folder, base())
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        lora.LoraSource(folder, base())
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        lora.LoraSource(folder, base())
    for text in ("{", "[]"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json"):
            lora.LoraSource(folder, base())


class CountedSource:
    """Notes which leaves are read."""

    def __init__(self, source):
        self.source, self.leaves, self.reads = source, source.leaves, []

    def read(self, name):
        self.reads.append(name)
        return self.source.read(name)


def test_reading_a_leaf_reads_that_leaf_only(tmp_path, monkeypatch):
    counted = CountedSource(base())
    tensors = factors("up", "conv") | {f"{PREFIX}model.norm.weight": normal(3)}
    source = lora.LoraSource(write(tmp_path, tensors), counted)
    reads = []
    real = SafetensorsSource.read
    monkeypatch.setattr(
        SafetensorsSource, "read", lambda self, name: reads.append(name) or real(self, name)
    )
    expert_set = rtx.ExpertSet.from_lora(counted, [source], check_finite=False)
    assert (counted.reads, reads) == ([], [])
    expert_set.expert("model/up/weight", 0)
    assert counted.reads == ["model/up/weight"]
    start = "base_model/model/model/up/lora_"
    assert reads == [f"{start}A/weight", f"{start}B/weight"]
    expert_set.expert("model/norm/weight", 0)
    assert counted.reads == ["model/up/weight"], "a full copy takes the leaf's place"


def test_from_lora(tmp_path):
    save_file(BASE, tmp_path / "base.safetensors")
    adapters = {name: factors("up", "square") for name in ("one", "two")}
    folders = [write(tmp_path / name, tensors) for name, tensors in adapters.items()]
    expert_set = rtx.ExpertSet.from_lora(tmp_path / "base.safetensors", folders)
    assert expert_set.names == ("one", "two")
    assert expert_set.layout == "torch"
    vectors = expert_set.task_vectors("model/up/weight")
    for task, tensors in enumerate(adapters.values()):
        want = 2 * product(tensors, "model.up")
        np.testing.assert_allclose(vectors[task], want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(expert_set.task_vectors("model/norm/weight"), np.zeros((2, 3)))
    given = rtx.ExpertSet.from_lora(
        base(),
        [folders[0], lora.LoraSource(folders[1], base())],
        names=["a", "b"],
        exclude=["conv"],
    )
    assert given.names == ("a", "b")
    assert "model/conv/weight" not in given.leaves
    np.testing.assert_array_equal(
        given.expert("model/up/weight", 1), expert_set.expert("model/up/weight", 1)
    )


def test_from_lora_tells_of_all_adapters(tmp_path):
    folders = [
        write(tmp_path / "one", factors("up"), r=3),
        write(tmp_path / "two", factors("up"), use_dora=True),
    ]
    with pytest.raises(ValueError, match="can't be read") as error:
        rtx.ExpertSet.from_lora(base(), folders)
    assert "says rank 3" in str(error.value)
    assert "use_dora" in str(error.value)
    bad = factors("up")
    bad[f"{PREFIX}model.up.lora_A.weight"][0, 0] = np.nan
    with pytest.raises(ValueError, match="one: model/up/weight has 5 values that are NaN"):
        rtx.ExpertSet.from_lora(base(), [write(tmp_path / "one", bad)])


# Offsets as adapters.

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
