"""Small data sets and tiny models, written the way that their sources lay them out, for the language suites.

The words of a text tell its label, but the models' weights are random: what they predict is for tests to compare.
"""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest
from tiny_snapshots import shifted

from retex_jax import models
from retex_jax.convert.architectures import ARCHITECTURES
from retex_jax.convert.export import export

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "sea"]
BERT_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
GPT_TOKENS = ["<|endoftext|>", "[UNK]"]
SIGNS = [*"ABCDEQ.:?", "Passage", "Question", "Answer"]

# Columns, number of classes (1: a number) and splits of each task, as the hub has them.
GLUE = {
    "cola": (("sentence",), 2, ("train", "validation", "test")),
    "sst2": (("sentence",), 2, ("train", "validation", "test")),
    "mrpc": (("sentence1", "sentence2"), 2, ("train", "validation", "test")),
    "stsb": (("sentence1", "sentence2"), 1, ("train", "validation", "test")),
    "qqp": (("question1", "question2"), 2, ("train", "validation", "test")),
    "mnli": (
        ("premise", "hypothesis"),
        3,
        ("train", "validation_matched", "validation_mismatched", "test_matched"),
    ),
    "qnli": (("question", "sentence"), 2, ("train", "validation", "test")),
    "rte": (("sentence1", "sentence2"), 2, ("train", "validation", "test")),
}


def sentence(rng, longest=6):
    """A few words."""
    return " ".join(rng.choice(WORDS, rng.integers(1, longest + 1)))


def glue_rows(task, split, count):
    """The rows of a split, column to values; those of a hidden test set have the label -1."""
    columns, classes, _ = GLUE[task]
    rng = np.random.default_rng([sum(map(ord, task + split)), count])
    labels = rng.integers(0, classes, count) if classes > 1 else rng.uniform(0, 5, count)
    labels = np.full(count, -1) if split.startswith("test") else labels
    texts = {column: [sentence(rng) for _ in range(count)] for column in columns}
    return {**texts, "label": labels.tolist(), "idx": list(range(count))}


def write_parquet(folder, split, rows, schema=None, shards=1):
    """Writes a split in the hub's layout."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(rows, schema=pyarrow.schema(schema) if schema else None)
    size = -(-table.num_rows // shards)
    for shard in range(shards):
        path = folder / f"{split}-{shard:05}-of-{shards:05}.parquet"
        parquet.write_table(table.slice(shard * size, size), path)


def write_glue(root, tasks=GLUE, count=60, shards=1):
    """Writes tasks as the hub's nyu-mll/glue has them."""
    pyarrow = pytest.importorskip("pyarrow")
    for task in tasks:
        columns, classes, splits = GLUE[task]
        label = pyarrow.int64() if classes > 1 else pyarrow.float32()
        schema = [(column, pyarrow.string()) for column in columns]
        schema += [("label", label), ("idx", pyarrow.int32())]
        for split in splits:
            rows = glue_rows(task, split, count)
            write_parquet(root / "glue" / task, split, rows, schema, shards)


def write_glue_of_tfds(root, task, count):
    """Writes a task as tensorflow-datasets prepares it, below ROOT/glue/TASK."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    columns, classes, splits = GLUE[task]

    def info(self):
        features = {column: tfds.features.Text() for column in columns}
        label = tfds.features.ClassLabel(num_classes=classes) if classes > 1 else np.float32
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({**features, "label": label})
        )

    def generate(self, split):
        rows = glue_rows(task, split, count)
        for i in range(count):
            yield i, {column: rows[column][i] for column in (*columns, "label")}

    members = {
        "VERSION": tfds.core.Version("2.0.0"),
        "BUILDER_CONFIGS": [tfds.core.BuilderConfig(name=task)],
        "name": "glue",
        "_info": info,
        "_generate_examples": generate,
        "_split_generators": lambda self, _: {
            split: self._generate_examples(split) for split in splits
        },
    }
    with tfds.core.registered.skip_registration():
        builder = type("StandIn", (tfds.core.GeneratorBasedBuilder,), members)
    builder(data_dir=root, file_format="array_record").download_and_prepare()


SUBJECTS = ("anatomy", "virology")


def mmlu_rows(split, count):
    """Rows of MMLU."""
    rng = np.random.default_rng([sum(map(ord, split)), count])
    return {
        "question": [f"{sentence(rng)} ?" for _ in range(count)],
        "subject": [SUBJECTS[i % 2] for i in range(count)],
        "choices": [[sentence(rng, 2) for _ in range(4)] for _ in range(count)],
        "answer": rng.integers(0, 4, count).tolist(),
    }


def truthfulqa_rows(count):
    """Rows of TruthfulQA, 2 to 5 answers each; the right one is the first, as in the source."""
    rng = np.random.default_rng(count)
    targets = []
    for _ in range(count):
        answers = list(dict.fromkeys(sentence(rng) for _ in range(rng.integers(2, 6))))
        answers = answers if len(answers) > 1 else [*answers, "sea sun"]
        targets.append({"choices": answers, "labels": [1] + [0] * (len(answers) - 1)})
    questions = [" ".join([*rng.choice(WORDS, 8), "?"]) for _ in range(count)]  # no two alike
    return {"question": questions, "mc1_targets": targets, "mc2_targets": targets}


BBQ_FILES = (
    "Age",
    "Disability_status",
    "Gender_identity",
    "Nationality",
    "Physical_appearance",
    "Race_ethnicity",
    "Race_x_SES",
    "Race_x_gender",
    "Religion",
    "SES",
    "Sexual_orientation",
)


def bbq_rows(category, count):
    """Rows of BBQ; four of each question."""
    rng = np.random.default_rng(sum(map(ord, category)))
    rows = []
    for number in range(count):
        answers = [sentence(rng, 2) for _ in range(3)]
        rows.append(
            {
                "example_id": number,
                "question_index": str(number // 4),
                "question_polarity": "neg",
                "context_condition": ("ambig", "disambig")[number % 2],
                "category": category,
                "answer_info": {f"ans{i}": [answers[i], "group"] for i in range(3)},
                "additional_metadata": {"subcategory": "None"},
                "context": sentence(rng) + " .",
                "question": f"{sentence(rng)} ?",
                **{f"ans{i}": answers[i] for i in range(3)},
                "label": int(rng.integers(0, 3)),
            }
        )
    return rows


def write_questions(root, count=40):
    """Writes MMLU and TruthfulQA as the hub has them, and BBQ as its repository."""
    for split, size in (("test", count), ("validation", count), ("dev", 10)):
        write_parquet(root / "mmlu/all", split, mmlu_rows(split, size))
    write_parquet(root / "truthful_qa/multiple_choice", "validation", truthfulqa_rows(2 * count))
    folder = root / "bbq/data"
    folder.mkdir(parents=True)
    for category in BBQ_FILES:
        lines = [json.dumps(row) for row in bbq_rows(category, 8)]
        (folder / f"{category}.jsonl").write_text("\n".join(lines) + "\n")


# Tokenizers and models


def write_tokenizer(folder, kind):
    """A tokenizer of words: "bert" sets RoBERTa's special tokens, "gpt" none."""
    tokenizers = pytest.importorskip("tokenizers")
    special = BERT_TOKENS if kind == "bert" else GPT_TOKENS
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *SIGNS])}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, "<unk>" if kind == "bert" else "[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if kind == "bert":
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> </s> $B </s>",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


VOCABULARY = len(BERT_TOKENS) + len(WORDS) + len(SIGNS)

ROBERTA = models.BertConfig(
    vocab_size=VOCABULARY,
    width=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=16,
    max_length=24,
    num_token_types=1,
    padding_idx=1,
    pool="cls",
    layer_norm_eps=1e-5,
)
GPT2 = dataclasses.replace(
    models.GPT2,
    vocab_size=VOCABULARY,
    width=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=16,
    max_length=24,
)
QWEN2 = dataclasses.replace(
    models.QWEN2_0_5B,
    vocab_size=VOCABULARY,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=16,
    max_length=192,
    lm_head="untied",
)


def write_classifiers(root, config):
    """The pretrained model and the experts of a suite of GLUE, as its configuration names them."""
    is_bert = "roberta" in config.experts.pretrained
    backbone = models.Bert(ROBERTA) if is_bert else models.Gpt2(GPT2)
    kind = {"head_kind": "roberta"} if is_bert else {"use_bias": False}
    prefix = "Roberta" if is_bert else "GPT2"
    base = models.init_params(backbone, jax.random.key(0))
    folder = root / config.experts.pretrained
    export(folder, backbone, base, ARCHITECTURES["RobertaModel" if is_bert else "GPT2LMHeadModel"])
    write_tokenizer(folder, "bert" if is_bert else "gpt")
    for seed, (task, name) in enumerate(
        zip(config.tasks, config.experts.repositories, strict=True)
    ):
        model = models.SequenceClassifier(backbone, GLUE[task][1], **kind)
        head = models.init_params(model, jax.random.key(seed))["head"]
        params = {"backbone": shifted(base, seed, 0.1), "head": shifted(head, seed, 0.3)}
        export(root / name, model, params, ARCHITECTURES[f"{prefix}ForSequenceClassification"])


def write_decoders(root, config):
    """The pretrained decoder and its experts, as the configuration names them."""
    model = models.Decoder(QWEN2)
    base = models.init_params(model, jax.random.key(0))
    architecture = ARCHITECTURES["Qwen2ForCausalLM"]
    export(root / config.experts.pretrained, model, base, architecture)
    write_tokenizer(root / config.experts.pretrained, "gpt")
    for seed, name in enumerate(config.experts.repositories):
        export(root / name, model, shifted(base, seed, 0.1), architecture)


def small(name, root, *experts):
    """A suite's experiment, as it is but for its size."""
    config = importlib.import_module(f"configs.{name}").get_config(*experts)
    config.data_sets.root = str(root / "datasets")
    config.experts.root = str(root / "checkpoints")
    config.model.max_length = 24
    config.data.max_train = 24
    config.baselines = {"weight_average": {}}
    config.offsets.rank = 16
    config.offsets.budget = 1e6  # bytes, enough for every rank
    config.offsets.sharing = "separate"
    config.identifier.rank = 3
    config.identifier.num_calibration = 12
    config.evaluate.batch_size = 16
    if name == "qwen_qa3":
        config.model.options = {}
        config.model.max_length = 128
        config.language.shots = 2
        config.language.max_answer = 8
    return config
