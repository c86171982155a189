"""A released artefact as a predictor."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
import tiny

import retex_jax as rtx
from retex_jax import data, experiment, models, offsets, protocols, recovery, release
from retex_jax.identifier import mahalanobis, subspace
from retex_jax.serving import Recovered


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.trained(tmp_path_factory)


@pytest.fixture(scope="module")
def recovered(run):
    return rtx.Recovered.load(run.workdir, max_batch=8)


def mixed(run, count):
    batch = protocols.mixed_test(run.tasks, seed=1)
    return {"image": batch["image"][:count]}, batch["task"][:count]


def expected(run, images, ids):
    """Logits of each image by its task's recovered expert and head, one at a time."""
    model, released = run.backbone.model, run.released
    heads = list(released.heads.values())
    wanted = []
    for image, task in zip(images, ids, strict=True):
        params = offsets.recover(released.state, int(task))
        features = recovery.run(model, params, {"image": image[None]}, 1)
        wanted.append(recovery.logits(heads[task], features)[0])
    return np.stack(wanted)


def test_predictions_of_unknown_tasks(run, recovered):
    inputs, _ = mixed(run, 21)
    ids = recovery.identify(
        run.backbone.model, run.released.state.merged, run.released.identifier, inputs, 21
    )
    assert len(set(ids.tolist())) == 3
    assert recovered.identify(inputs) == [tiny.NAMES[task] for task in ids]
    want = expected(run, inputs["image"], ids)
    for mode in recovery.MODES:
        found = recovered.predict(inputs, mode=mode)
        assert [one.task for one in found] == [tiny.NAMES[task] for task in ids]
        np.testing.assert_allclose([one.logits for one in found], want, rtol=1e-4, atol=1e-4)
        assert [one.label for one in found] == want.argmax(axis=1).tolist()
        assert [one.class_name for one in found] == [f"class {one.label}" for one in found]


def test_predictions_of_known_tasks(run, recovered):
    inputs, ids = mixed(run, 11)
    names = [tiny.NAMES[task] for task in ids]
    found = recovered.predict(inputs, task=names)
    want = expected(run, inputs["image"], ids)
    np.testing.assert_allclose([one.logits for one in found], want, rtol=1e-4, atol=1e-4)
    same = recovered.predict(inputs, task="bars")
    assert {one.task for one in same} == {"bars"}
    want = expected(run, inputs["image"], [1] * 11)
    np.testing.assert_allclose([one.logits for one in same], want, rtol=1e-4, atol=1e-4)
    assert recovered.tasks == tiny.NAMES


def test_no_inputs(run, recovered):
    inputs, _ = mixed(run, 0)
    assert recovered.predict(inputs) == []
    assert recovered.predict(inputs, task="bars") == []
    assert recovered.identify(inputs) == []


def test_what_is_not_named_is_none(run):
    metadata = {name: fact for name, fact in run.released.metadata.items() if name != "classes"}
    unnamed = dataclasses.replace(run.released, metadata=metadata)
    predictor = Recovered(run.backbone.model, unnamed, max_batch=2)
    assert predictor.predict(mixed(run, 1)[0])[0].class_name is None


def test_after_the_warm_up_nothing_is_compiled(run, caplog):
    predictor = rtx.Recovered.load(run.workdir, max_batch=4)
    predictor.warm_up()
    inputs, ids = mixed(run, 21)
    with jax.log_compiles():
        for count in (1, 2, 3, 4, 5, 7, 21):
            some = {"image": inputs["image"][:count]}
            for mode in ("auto", "factored", "materialized"):
                predictor.predict(some, mode=mode)
                predictor.predict(some, [tiny.NAMES[task] for task in ids[:count]], mode=mode)
                predictor.predict(some, "rings", mode=mode)
        assert not [text for text in caplog.messages if text.startswith("Compiling")]
        jax.jit(lambda x: x * 4.25)(np.ones(7))
        assert [text for text in caplog.messages if text.startswith("Compiling")]


def test_no_weights_and_no_task_are_loaded(run, monkeypatch):
    for module, name in (
        (experiment, "load"),
        (experiment.pretrained, "load_backbone"),
        (data, "load_task"),
    ):
        monkeypatch.setattr(module, name, lambda *args, **options: pytest.fail("loaded"))
    predictor = rtx.Recovered.load(run.workdir, max_batch=2, offline=True)
    assert len(predictor.identify(mixed(run, 2)[0])) == 2


def test_threads_get_what_one_gets(run, recovered):
    inputs, _ = mixed(run, 40)
    parts = [{"image": inputs["image"][start : start + 5]} for start in range(0, 40, 5)]
    wanted = [recovered.predict(part, mode="grouped") for part in parts]
    found = {}

    def work(index):
        found[index] = recovered.predict(parts[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, want in enumerate(wanted):
        assert [one.task for one in found[index]] == [one.task for one in want]
        for one, other in zip(found[index], want, strict=True):
            np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-4)


def text_release(model, names=("a", "b")):
    """Two tasks of a model of texts, drawn."""
    params = models.init_params(model, jax.random.key(0))
    experts = [jax.tree.map(lambda x, s=s: x + 0.05 * (s + 1), params) for s in range(2)]
    state = offsets.fit(rtx.ExpertSet.from_trees(params, experts), rank=4)
    rng = np.random.default_rng(0)
    width = model.config.width
    signatures = subspace.fit([rng.normal(size=(9, width)) for _ in names], 2)
    heads = {
        name: {"kernel": rng.normal(size=(width, n)).astype("f4")}
        for n, name in enumerate(names, start=2)
    }
    return release.Release(state, recovery.Identifier(signatures, 1), heads, {})


def encode(texts):
    """Tokens from letters."""
    ids = np.zeros((len(texts), 24), np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = [ord(letter) % 29 + 1 for letter in text]
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int32)}


def test_texts_of_many_lengths(caplog):
    model = models.Bert(
        models.BertConfig(
            vocab_size=30, width=8, num_layers=2, num_heads=2, mlp_dim=8, max_length=24
        )
    )
    predictor = Recovered(model, text_release(model), encode=encode, max_batch=2)
    predictor.warm_up()
    texts = ["short", "a text of length", "x" * 24, "middling, so to say"]
    with jax.log_compiles():
        found = predictor.predict(texts)
        arrays = predictor.predict(encode(texts), [one.task for one in found])
        assert not [text for text in caplog.messages if text.startswith("Compiling")]
    for one, other in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
    for text, one in zip(texts, found, strict=True):
        task = predictor.tasks.index(one.task)
        params = offsets.recover(predictor.released.state, task)
        features = recovery.run(model, params, encode([text]), 1)
        want = recovery.logits(predictor.released.heads[one.task], features)[0]
        np.testing.assert_allclose(one.logits, want, rtol=1e-4, atol=1e-4)


class Encoder:
    """`encode` to a length of its own."""

    def __init__(self, max_length):
        self.max_length = max_length

    def __call__(self, texts):
        lengths = np.array([len(text) for text in texts])
        mask = (np.arange(self.max_length) < lengths[:, None]).astype(np.int32)
        return {"input_ids": mask, "attention_mask": mask}


@pytest.mark.parametrize(
    ("encoded", "max_length", "lengths"),
    [(64, 35, (16, 32, 48)), (40, None, (16, 32, 40)), (40, 64, (16, 32, 40)), (24, 16, (16,))],
)
def test_the_warm_up_compiles_the_lengths_of_encoded_texts(encoded, max_length, lengths, caplog):
    config = models.BertConfig(width=8, num_layers=1, num_heads=2, mlp_dim=8, max_length=64)
    model = models.Bert(dataclasses.replace(config, vocab_size=10 * encoded + (max_length or 0)))
    predictor = Recovered(model, text_release(model), encode=Encoder(encoded), max_batch=1)
    with jax.log_compiles():
        predictor.warm_up(max_length=max_length)
        programs = [text for text in caplog.messages if text.startswith("Compiling jit(_plain)")]
        assert len(programs) == len(lengths)
        caplog.clear()
        for length in {1, 17, 35, 40, max_length}:
            if length and length <= lengths[-1]:
                predictor.predict(["x" * length])
        assert not [text for text in caplog.messages if text.startswith("Compiling")]


def test_the_warm_up_of_a_scanned_model():
    config = models.BertConfig(vocab_size=30, width=8, num_layers=2, num_heads=2, mlp_dim=8)
    model = models.Bert(dataclasses.replace(config, max_length=16, scan=True))
    predictor = Recovered(model, text_release(model), encode=Encoder(16), max_batch=1)
    predictor.warm_up()
    assert len(predictor.predict(["a text", "another"])) == 2


def test_an_identifier_by_experts_reads_those_that_are_kept(monkeypatch):
    model = models.Bert(
        models.BertConfig(
            vocab_size=30, width=8, num_layers=2, num_heads=2, mlp_dim=8, max_length=24
        )
    )
    released, recovered, recover = text_release(model), [], offsets.recover
    texts = ["a", "bc", "def", "ghij", "klmno"]
    features = [
        recovery.run(model, offsets.recover(released.state, task), encode(texts), 5, layer=1)
        for task in range(2)
    ]
    gaussians = mahalanobis.fit(features)
    identifier = recovery.Identifier(gaussians, 1, "mahalanobis")
    predictor = Recovered(
        model, dataclasses.replace(released, identifier=identifier), encode=encode, max_batch=2
    )
    monkeypatch.setattr(
        offsets, "recover", lambda state, task: recovered.append(task) or recover(state, task)
    )
    found = predictor.identify(texts)
    predictor.predict(texts, mode="materialized")
    assert recovered == [0, 1]
    want = mahalanobis.scores(gaussians, np.stack(features)).argmax(axis=1)
    assert found == [predictor.tasks[task] for task in want]


def test_images_that_are_decoded_when_they_are_read(run, recovered):
    inputs, ids = mixed(run, 24)
    names = [tiny.NAMES[task] for task in ids]
    largest, decode = [], data.Images.decode
    pixels = inputs["image"]
    images = data.Images(lambda i: pixels[i], np.arange(24), 8, "arrays")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Images, "decode", lambda self: largest.append(len(self)) or decode(self))
        found = [recovered.predict({"image": images}, task) for task in (None, names)]
    assert max(largest) == recovered.max_batch
    for some, task in zip(found, (None, names), strict=True):
        for one, other in zip(some, recovered.predict(inputs, task), strict=True):
            assert one.task == other.task
            np.testing.assert_array_equal(one.logits, other.logits)


def test_wrong_requests(run, recovered):
    inputs, _ = mixed(run, 3)
    with pytest.raises(ValueError, match=r"task: got 'bras', .*did you mean 'bars'"):
        recovered.predict(inputs, "bras")
    with pytest.raises(ValueError, match="task: got 2 names, expected one for each of 3 inputs"):
        recovered.predict(inputs, ["bars", "dots"])
    with pytest.raises(ValueError, match=r"batch: the model reads \['image'\], got \['images'\]"):
        recovered.predict({"images": inputs["image"]})
    with pytest.raises(ValueError, match=r"batch: got texts, expected arrays \['image'\]"):
        recovered.predict(["a text"])
    with pytest.raises(ValueError, match="mode: got 'fast'"):
        recovered.predict(inputs, "bars", mode="fast")
    model = models.Bert(
        models.BertConfig(
            vocab_size=30, width=8, num_layers=2, num_heads=2, mlp_dim=8, max_length=24
        )
    )
    texts = Recovered(model, text_release(model), encode=encode)
    with pytest.raises(ValueError, match="batch: got one text"):
        texts.predict("one text")
    tokens = encode(["a", "b"])
    with pytest.raises(ValueError, match="batch: expected arrays of one length"):
        texts.predict({**tokens, "attention_mask": tokens["attention_mask"][:1]})
    wider = models.Bert(dataclasses.replace(model.config, mlp_dim=9))
    with pytest.raises(ValueError, match=r"mlp/fc1/kernel: \(8, 8\), expected \(8, 9\)"):
        Recovered(wider, text_release(model))


def test_missing_artifact(tmp_path):
    with pytest.raises(FileNotFoundError):
        rtx.Recovered.load(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'Recoverd'"):
        _ = rtx.Recoverd
