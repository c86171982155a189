"""Language data sets in their published layouts, written by the tests."""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("pyarrow")
tokenizers = pytest.importorskip("tokenizers")

import language_stand_ins as stand_ins  # noqa: E402

from retex_jax import data  # noqa: E402
from retex_jax.data import glue, language, questions  # noqa: E402


def encoder(tmp_path, kind="bert", max_length=24):
    path = stand_ins.write_tokenizer(tmp_path / kind, kind)
    return data.load_tokenizer(path.read_bytes(), max_length)


def problems(names, root):
    return [line for name in names for line in data.data_set_problems(name, root)]


def words(arrays, kind="bert"):
    """The words of each row of token ids, without padding."""
    special = stand_ins.BERT_TOKENS if kind == "bert" else stand_ins.GPT_TOKENS
    names = [*special, *stand_ins.WORDS, *stand_ins.SIGNS]
    return [
        [names[i] for i in row[mask > 0]]
        for row, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True)
    ]


# GLUE


@pytest.mark.parametrize("task", stand_ins.GLUE)
def test_every_task_of_glue_is_read(tmp_path, task):
    stand_ins.write_glue(tmp_path, (task,), count=30, shards=2)
    loaded = data.load_language_task(task, encode=encoder(tmp_path), root=tmp_path)
    columns, classes, _ = stand_ins.GLUE[task]
    assert loaded.num_outputs == classes
    rows = stand_ins.glue_rows(task, "validation_matched" if task == "mnli" else "validation", 30)
    want = {}
    for *texts, label in zip(*(rows[column] for column in columns), rows["label"], strict=True):
        joined = " </s> </s> ".join(texts)
        want.setdefault(f"<s> {joined} </s>", []).append(label)
    test = loaded.splits["test"]
    found = {}
    for text, label in zip(words(test), test["label"].tolist(), strict=True):
        found.setdefault(" ".join(text), []).append(label)
    assert found.keys() == want.keys()
    for text, labels in want.items():
        assert sorted(found[text]) == pytest.approx(sorted(labels), abs=1e-6)
    assert test["label"].dtype == (np.float32 if classes == 1 else np.int32)


def test_metrics_and_classes_of_glue():
    metrics = {name: spec.metric for name, spec in glue.GLUE.items()}
    assert metrics.pop("cola") == "matthews" and metrics.pop("stsb") == "pearson_spearman"
    assert set(metrics.values()) == {"accuracy"}
    assert {name: len(spec.classes) or 1 for name, spec in glue.GLUE.items()} == {
        name: classes for name, (_, classes, _) in stand_ins.GLUE.items()
    }
    assert {name: spec.columns for name, spec in glue.GLUE.items()} == {
        name: columns for name, (columns, _, _) in stand_ins.GLUE.items()
    }


def test_validation_is_held_out_of_the_published_training_set(tmp_path):
    stand_ins.write_glue(tmp_path, ("sst2",), count=50)
    encode = encoder(tmp_path)
    splits = data.load_language_task("sst2", encode=encode, root=tmp_path, max_val=4).splits
    sizes = {name: len(split["label"]) for name, split in splits.items()}
    assert sizes == {"train": 45, "val": 4, "test": 50}
    splits = data.load_language_task("sst2", encode=encode, root=tmp_path).splits
    assert len(splits["val"]["label"]) == 5
    held = [" ".join(text) for name in ("train", "val") for text in words(splits[name])]
    rows = stand_ins.glue_rows("sst2", "train", 50)["sentence"]
    assert sorted(held) == sorted(f"<s> {text} </s>" for text in rows)


def test_limits_and_seeds(tmp_path):
    stand_ins.write_glue(tmp_path, ("sst2",), count=50)
    encode = encoder(tmp_path)

    def load(**options):
        task = data.load_language_task("sst2", encode=encode, root=tmp_path, **options)
        return {name: split["input_ids"] for name, split in task.splits.items()}

    whole, cut, other = load(), load(max_train=7, max_val=2, max_test=5), load(seed=1)
    assert {name: len(ids) for name, ids in cut.items()} == {"train": 7, "val": 2, "test": 5}
    np.testing.assert_array_equal(cut["test"], whole["test"][:5])
    assert (whole["test"] != other["test"]).any()
    with pytest.raises(ValueError, match=r"max_val=0, max_test=-1: expected"):
        load(max_val=0, max_test=-1)


def test_metric_can_be_another(tmp_path):
    stand_ins.write_glue(tmp_path, ("cola",))
    options = {"encode": encoder(tmp_path), "root": tmp_path}
    assert data.load_language_task("cola", **options).metric == "matthews"
    assert data.load_language_task("cola", metric="accuracy", **options).metric == "accuracy"


def test_hidden_labels_are_refused(tmp_path):
    rows = stand_ins.glue_rows("sst2", "test", 20)
    for split in ("train", "validation"):
        stand_ins.write_parquet(tmp_path / "glue/sst2", split, rows)
    with pytest.raises(ValueError, match="sst2: labels -1 to -1, expected 0 to 1"):
        data.load_language_task("sst2", encode=encoder(tmp_path), root=tmp_path)


def test_too_few_examples_are_refused(tmp_path):
    stand_ins.write_glue(tmp_path, ("rte",), count=8)
    with pytest.raises(ValueError, match="rte: 8 examples leave val empty"):
        data.load_language_task("rte", encode=encoder(tmp_path), root=tmp_path)


def test_missing_files_are_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    stand_ins.write_glue(tmp_path, ("cola", "rte"), count=20, shards=2)
    (tmp_path / "glue/rte/validation-00001-of-00002.parquet").unlink()
    stand_ins.write_glue(tmp_path, ("mnli",), count=20)
    (tmp_path / "glue/mnli/validation_matched-00000-of-00001.parquet").unlink()
    rte, mnli, qqp, bbq = problems(["cola", "rte", "mnli", "qqp", "bbq", "movie"], tmp_path)
    assert rte.endswith(f"shards missing: {tmp_path}/glue/rte/validation-00001-of-00002.parquet")
    assert "glue/mnli: splits ['validation_matched'] missing, found ['test_matched'" in mnli
    assert qqp.startswith(f"tasks: qqp: no data in {tmp_path}/glue/qqp; get it with: hf download ")
    assert f"--include 'qqp/*' --local-dir {tmp_path}/glue; or tfds build glue/qqp" in qqp
    assert f"git clone https://github.com/nyu-mll/BBQ {tmp_path}/bbq" in bbq
    with pytest.raises(FileNotFoundError, match="qqp: no data in"):
        data.load_task("qqp", encode=encoder(tmp_path), root=tmp_path)


def test_missing_pyarrow_is_named(tmp_path, monkeypatch):
    stand_ins.write_glue(tmp_path, ("cola",), count=20)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    [found] = problems(["cola"], tmp_path)
    assert "pip install 'retex_jax[language]'" in found


def test_damaged_files_are_named(tmp_path):
    stand_ins.write_glue(tmp_path, ("cola", "sst2"), count=20)
    path = tmp_path / "glue/cola/train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cola/train-00000-of-00001\.parquet: "):
        data.load_language_task("cola", encode=encoder(tmp_path), root=tmp_path)
    stand_ins.write_parquet(tmp_path / "glue/sst2", "train", {"text": ["red"], "label": [0]})
    with pytest.raises(ValueError, match=r"columns \['text', 'label'\], expected \['sentence'\]"):
        data.load_language_task("sst2", encode=encoder(tmp_path), root=tmp_path)


def test_glue_that_tensorflow_datasets_prepared(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    stand_ins.write_glue_of_tfds(tmp_path, "stsb", 20)
    assert problems(["stsb"], tmp_path) == []
    task = data.load_task("stsb", encode=encoder(tmp_path), root=tmp_path)
    test = task.splits["test"]
    rows = stand_ins.glue_rows("stsb", "validation", 20)
    want = {
        f"<s> {first} </s> </s> {second} </s>": label
        for first, second, label in zip(
            rows["sentence1"], rows["sentence2"], rows["label"], strict=True
        )
    }
    assert {
        " ".join(text): label
        for text, label in zip(words(test), test["label"].tolist(), strict=True)
    } == pytest.approx(want, abs=1e-6)


# Tokenising


@pytest.mark.parametrize("kind", ["bert", "gpt"])
@pytest.mark.parametrize("max_length", [6, 9, 24])
def test_pairs_are_encoded_as_transformers_does(tmp_path, kind, max_length):
    transformers = pytest.importorskip("transformers")
    encode = encoder(tmp_path, kind, max_length)
    rng = np.random.default_rng(0)
    pairs = [(stand_ins.sentence(rng), stand_ins.sentence(rng)) for _ in range(40)]
    pad = "<pad>" if kind == "bert" else "<|endoftext|>"
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / kind / "tokenizer.json"), pad_token=pad
    )
    want = theirs(
        [a for a, _ in pairs],
        [b for _, b in pairs],
        truncation=True,
        max_length=max_length,
        padding="max_length",
        padding_side="right",
    )
    found = encode(pairs)
    np.testing.assert_array_equal(found["input_ids"], want["input_ids"])
    np.testing.assert_array_equal(found["attention_mask"], want["attention_mask"])


def test_pairs_need_room(tmp_path):
    encode = encoder(tmp_path, max_length=4)
    assert encode(["red"])["input_ids"].shape == (1, 4)
    with pytest.raises(ValueError, match="max_length=4: expected > 4"):
        encode([("red", "blue")])


def test_prefixes_and_continuations(tmp_path):
    encode = encoder(tmp_path, max_length=5)
    ids = {word: i for i, word in enumerate([*stand_ins.BERT_TOKENS, *stand_ins.WORDS])}
    long = "red green blue one two three"
    assert encode.prefixes([long, "red"]) == [
        [ids[word] for word in ["<s>", *long.split()]],
        [ids["<s>"], ids["red"]],
    ]
    assert encode.continuations([f" {long}", " cat"], after="sun") == [
        [ids[word] for word in long.split()],
        [ids["cat"]],
    ]
    assert encode(["red"])["input_ids"].shape == (1, 5)


# Questions


def load_questions(tmp_path, name, max_length=160, **options):
    return data.load_language_task(
        name,
        encode=encoder(tmp_path, "gpt", max_length),
        root=tmp_path,
        **{"max_answer": 8, **options},
    )


def answers_of(task, row, split="test"):
    arrays = task.splits[split]
    return words(
        {"input_ids": arrays["choice_ids"][row], "attention_mask": arrays["choice_mask"][row]},
        "gpt",
    )


def test_mmlu_prompts(tmp_path):
    stand_ins.write_questions(tmp_path)
    task = load_questions(tmp_path, "mmlu", shots=2)
    assert (task.num_outputs, task.metric, task.classes) == (0, "accuracy", ())
    sizes = {name: len(split["label"]) for name, split in task.splits.items()}
    assert sizes == {"train": 36, "val": 4, "test": 40}
    dev, test = stand_ins.mmlu_rows("dev", 10), stand_ins.mmlu_rows("test", 40)

    def tokens(rows, i):
        lines = [[*["Question", ":"], *rows["question"][i].split()]]
        for letter, choice in zip("ABCD", rows["choices"][i], strict=True):
            lines.append([letter, ".", *choice.split()])
        return [token for line in [*lines, ["Answer", ":"]] for token in line]

    want = {}
    for i, subject in enumerate(test["subject"]):
        solved = [j for j, other in enumerate(dev["subject"]) if other == subject][:2]
        shots = [t for j in solved for t in [*tokens(dev, j), "ABCD"[dev["answer"][j]]]]
        want[" ".join([*shots, *tokens(test, i)])] = test["answer"][i]
    prompts = [" ".join(text) for text in words(task.splits["test"], "gpt")]
    assert dict(zip(prompts, task.splits["test"]["label"].tolist(), strict=True)) == want
    assert answers_of(task, 0) == [["A"], ["B"], ["C"], ["D"]]


def test_prompts_that_do_not_fit_lose_their_first_shots_and_then_their_start(tmp_path):
    shots = ("red red ", "blue blue ")
    question = questions.Question(shots, "cat dog sun", (" A", " B"), 1, "")
    for max_length, want in (
        (15, "red red blue blue cat dog sun"),
        (14, "blue blue cat dog sun"),
        (12, "cat dog sun"),
        (10, "dog sun"),
    ):
        arrays = questions.encode([question], encoder(tmp_path, "gpt", max_length), 8)
        assert [" ".join(text) for text in words(arrays, "gpt")] == [want]
    with pytest.raises(ValueError, match="max_answer=8: expected 1 to max_length - 1 = 7"):
        questions.encode([question], encoder(tmp_path, "gpt", 8), 8)


def test_answers_that_are_too_long_are_refused(tmp_path):
    question = questions.Question((), "cat", (" red green blue", " A"), 0, "")
    with pytest.raises(ValueError, match=r"max_answer=2: 1 answers have no token or more, up to 3"):
        questions.encode([question], encoder(tmp_path, "gpt"), 2)


@pytest.mark.parametrize("layout", ["hub", "authors"])
def test_truthfulqa(tmp_path, layout):
    rows = stand_ins.truthfulqa_rows(50)
    if layout == "hub":
        folder = tmp_path / "truthful_qa/multiple_choice"
        stand_ins.write_parquet(folder, "validation", rows)
    else:
        entries = [
            {"question": q, "mc1_targets": dict(zip(t["choices"], t["labels"], strict=True))}
            for q, t in zip(rows["question"], rows["mc1_targets"], strict=True)
        ]
        (tmp_path / "truthful_qa/data").mkdir(parents=True)
        (tmp_path / "truthful_qa/data/mc_task.json").write_text(json.dumps(entries))
    task = load_questions(tmp_path, "truthfulqa")
    sizes = {name: len(split["label"]) for name, split in task.splits.items()}
    assert sizes == {"train": 10, "val": 5, "test": 35}
    want = {
        f"Q : {question} A :": [answer.split() for answer in target["choices"]]
        for question, target in zip(rows["question"], rows["mc1_targets"], strict=True)
    }
    prompts = [" ".join(text) for name in sizes for text in words(task.splits[name], "gpt")]
    assert sorted(prompts) == sorted(want)
    for row, text in enumerate(words(task.splits["test"], "gpt")):
        found = [answer for answer in answers_of(task, row) if answer]
        assert found == want[" ".join(text)]
    assert set(task.splits["test"]["label"].tolist()) == {0}


def test_bbq(tmp_path):
    stand_ins.write_questions(tmp_path)
    task = load_questions(tmp_path, "bbq")
    rows = [row for category in stand_ins.BBQ_FILES for row in stand_ins.bbq_rows(category, 8)]
    want = {}
    for row in rows:
        lines = " ".join(f"{letter} . {row[f'ans{i}']}" for i, letter in enumerate("ABC"))
        text = f"Passage : {row['context']} Question : {row['question']} {lines} Answer :"
        want[text] = row["label"]
    found, splits = {}, {}
    for name, split in task.splits.items():
        for text, label in zip(words(split, "gpt"), split["label"].tolist(), strict=True):
            found[" ".join(text)] = label
            splits.setdefault(" ".join(text), name)
    assert found == want
    assert answers_of(task, 0) == [["A"], ["B"], ["C"]]
    of_group = {}
    for row, text in zip(rows, want, strict=True):
        of_group.setdefault((row["category"], row["question_index"]), set()).add(splits[text])
    assert all(len(names) == 1 for names in of_group.values())
    assert {name for names in of_group.values() for name in names} == {"train", "val", "test"}


def test_missing_questions_are_named(tmp_path):
    stand_ins.write_questions(tmp_path)
    (tmp_path / "bbq/data/SES.jsonl").unlink()
    (tmp_path / "mmlu/all/dev-00000-of-00001.parquet").unlink()
    (tmp_path / "truthful_qa/multiple_choice/validation-00000-of-00001.parquet").unlink()
    mmlu, truthfulqa, bbq = problems(["mmlu", "truthfulqa", "bbq"], tmp_path)
    assert "mmlu/all: splits ['dev'] missing, found ['test', 'validation']" in mmlu
    assert f"truthfulqa: no data in {tmp_path}/truthful_qa/multiple_choice; get it" in truthfulqa
    assert bbq.startswith(f"tasks: bbq: no SES.jsonl in {tmp_path}/bbq/data; get it with: git")


def test_damaged_questions_are_named(tmp_path):
    stand_ins.write_questions(tmp_path)
    path = tmp_path / "bbq/data/SES.jsonl"
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(ValueError, match=r"SES\.jsonl:9: "):
        load_questions(tmp_path, "bbq")
    rows = stand_ins.truthfulqa_rows(20)
    rows["mc1_targets"][3]["labels"] = [0] * len(rows["mc1_targets"][3]["labels"])
    stand_ins.write_parquet(tmp_path / "truthful_qa/multiple_choice", "validation", rows)
    with pytest.raises(ValueError, match=r"truthfulqa: 1 questions have no right answer.*Q: "):
        load_questions(tmp_path, "truthfulqa")


@pytest.mark.parametrize("count", [10, 817])
def test_shares_of_a_source_with_one_split(count):
    parts = language.draw_groups([f"{i}" for i in range(count)], seed=0)
    sizes = {name: len(rows) for name, rows in parts.items()}
    first, second = round(0.2 * count), round(0.3 * count)
    assert sizes == {"train": first, "val": second - first, "test": count - second}
    np.testing.assert_array_equal(np.sort(np.concatenate([*parts.values()])), np.arange(count))


def test_one_group_fills_one_split():
    with pytest.raises(ValueError, match="40 examples leave val, test empty"):
        language.draw_groups(["same"] * 40, seed=0)


def test_joined_fills_up():
    first, second = np.ones((2, 1, 3), "i4"), np.full((1, 2, 2), 2, "i4")
    assert data.joined([first, second]).tolist() == [
        [[1, 1, 1], [0, 0, 0]],
        [[1, 1, 1], [0, 0, 0]],
        [[2, 2, 0], [2, 2, 0]],
    ]
    assert data.joined([np.arange(2), np.arange(3)]).tolist() == [0, 1, 0, 1, 2]
