"""LoRA adapters read as experts, in hand-made folders."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import retex_jax as rtx
from retex_jax import lora, tree
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
