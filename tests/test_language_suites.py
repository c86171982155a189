"""The language suites at a reduced size: from data sets and snapshots as published to a table.

What a run reports is compared with scikit-learn, scipy and the experts' own models, loaded one by one.
"""

import copy
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import language_stand_ins as stand_ins
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import tiny

from retex_jax import command_line, data, evaluate, preflight, release, serving, train
from retex_jax.convert.architectures import load

pytest.importorskip("pyarrow")


def trained(name, write_data, write_models, tmp_path_factory):
    root = tmp_path_factory.mktemp(name)
    config = stand_ins.small(name, root)
    write_data(root / "datasets")
    write_models(root / "checkpoints", config)
    with tiny.world(root / "cache"):
        results = train.train(config, root / "workdir")
    return root, config, results


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return trained(
        "roberta_base_glue8", stand_ins.write_glue, stand_ins.write_classifiers, tmp_path_factory
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return trained(
        "gpt2_glue7", stand_ins.write_glue, stand_ins.write_classifiers, tmp_path_factory
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return trained(
        "qwen_qa3", stand_ins.write_questions, stand_ins.write_decoders, tmp_path_factory
    )


def expert_outputs(root, config, task):
    """The outputs of an expert's own model on a task's published test set, and the labels, text by text."""
    columns = stand_ins.GLUE[task][0]
    split = "validation_matched" if task == "mnli" else "validation"
    rows = stand_ins.glue_rows(task, split, 60)
    tokenizers = pytest.importorskip("tokenizers")
    folder = root / "checkpoints" / config.experts.pretrained
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(config.model.max_length)
    name = config.experts.repositories[config.tasks.index(task)]
    expert = load(root / "checkpoints" / name)
    run = jax.jit(lambda batch: expert.model.apply({"params": expert.params}, batch))
    outputs = []
    for texts in zip(*(rows[column] for column in columns), strict=True):
        ids = np.zeros((1, config.model.max_length), np.int32)
        found = tokenizer.encode(*texts).ids
        ids[0, : len(found)] = found
        mask = (np.arange(ids.shape[1]) < len(found)).astype(np.int32)[None]
        outputs.append(np.asarray(run({"input_ids": ids, "attention_mask": mask}))[0])
    return np.array(outputs), np.array(rows["label"])


def by_libraries(metric, outputs, labels):
    """A metric by scikit-learn and scipy."""
    if metric == "pearson_spearman":
        pearson = scipy.stats.pearsonr(outputs[:, 0], labels).statistic
        return (pearson + scipy.stats.spearmanr(outputs[:, 0], labels).statistic) / 2
    measure = {
        "accuracy": sklearn.metrics.accuracy_score,
        "matthews": sklearn.metrics.matthews_corrcoef,
    }[metric]
    return measure(labels, outputs.argmax(axis=1))


ROBERTA_METRICS = {"cola": "matthews", "stsb": "pearson_spearman"}


@pytest.mark.parametrize("task", ["cola", "sst2", "stsb", "mnli"])
def test_roberta_experts_have_the_metrics_of_the_libraries(roberta, task):
    root, config, results = roberta
    want = by_libraries(ROBERTA_METRICS.get(task, "accuracy"), *expert_outputs(root, config, task))
    assert results["individual"][task] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("task", ["cola", "qqp"])
def test_gpt2_experts_have_accuracies(gpt2, task):
    root, config, results = gpt2
    want = by_libraries("accuracy", *expert_outputs(root, config, task))
    assert results["individual"][task] == pytest.approx(want, abs=1e-6)


def rows_by_kind(results):
    """The recovered experts' row with the task known, and the two with it unknown."""
    known, own_head, nothing = (row for row in results["rows"] if row["method"] == "retex")
    return known, own_head, nothing


@pytest.mark.parametrize("suite", ["roberta", "gpt2", "qwen"])
def test_experts_are_recovered(suite, request):
    """Offsets of full rank hold every expert, so all is as the experts have it; averaging is not."""
    _, config, results = request.getfixturevalue(suite)
    known, own_head, nothing = rows_by_kind(results)
    assert list(known["accuracy"]) == list(config.tasks)
    for task, value in results["individual"].items():
        assert known["accuracy"][task] == pytest.approx(value, abs=1e-3)
        assert abs(nothing["accuracy"][task]) <= 1 and abs(own_head["accuracy"][task]) <= 1
    [averaged] = [row for row in results["rows"] if row["method"] == "weight_average"]
    differences = [
        abs(averaged["accuracy"][task] - value) for task, value in results["individual"].items()
    ]
    assert max(differences) > 0.05
    assert (own_head["head_known"], nothing["head_known"]) == (True, False)


def test_questions_need_no_head(qwen):
    """An unknown task costs a question its expert, not its answers."""
    *_, results = qwen
    _, own_head, nothing = rows_by_kind(results)
    assert own_head["accuracy"] == nothing["accuracy"]


def test_report_and_table_name_every_task(roberta, capsys):
    root, config, results = roberta
    page = (root / "workdir/report.html").read_text()
    assert all(task in page for task in config.tasks)
    evaluate.print_results(list(config.tasks), results["individual"], results["rows"])
    printed = capsys.readouterr().out
    assert all(task in printed for task in config.tasks)


def test_mixed_labels_of_numbers_and_classes(roberta):
    """STS-B's numbers and the classes of the others travel in one batch."""
    *_, results = roberta
    _, own_head, _ = rows_by_kind(results)
    assert set(own_head["accuracy"]) == set(results["individual"])
    assert 0 <= own_head["identification_accuracy"] <= 1


# Questions


def expert_answers(root, config, task):
    """For each question, the answer of the highest log-likelihood by an expert's whole sequences; and the right one."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = root / "checkpoints" / config.experts.pretrained
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    name = config.experts.repositories[config.tasks.index(task)]
    expert = load(root / "checkpoints" / name)

    @jax.jit
    def log_probs(ids, mask):
        batch = {"input_ids": ids, "attention_mask": mask}
        logits = expert.model.apply({"params": expert.params}, batch, method="lm_logits")
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    def likelihood(prompt, answer):
        first, second = tokenizer.encode(prompt).ids, tokenizer.encode(answer).ids
        whole = np.zeros((1, 128), np.int32)
        whole[0, : len(first) + len(second)] = [*first, *second]
        mask = (np.arange(128) < len(first) + len(second)).astype(np.int32)[None]
        scores = np.asarray(log_probs(whole, mask))[0]
        return sum(scores[len(first) - 1 + i, token] for i, token in enumerate(second))

    found = []
    for prompt, answers, label in published_questions(task):
        scores = [likelihood(prompt, answer) for answer in answers]
        found.append((int(np.argmax(scores)), label, prompt))
    return found


def published_questions(task):
    """Prompts, answers and labels of MMLU's test set and of all of TruthfulQA, from the rows that were written."""
    if task == "truthfulqa":
        rows = stand_ins.truthfulqa_rows(80)
        for question, target in zip(rows["question"], rows["mc1_targets"], strict=True):
            yield f"Q: {question}\nA:", target["choices"], target["labels"].index(1)
        return
    dev, test = stand_ins.mmlu_rows("dev", 10), stand_ins.mmlu_rows("test", 40)

    def text(rows, i):
        lines = [
            f"{letter}. {choice}" for letter, choice in zip("ABCD", rows["choices"][i], strict=True)
        ]
        return "\n".join([f"Question: {rows['question'][i]}", *lines, "Answer:"])

    for i, subject in enumerate(test["subject"]):
        solved = [j for j, other in enumerate(dev["subject"]) if other == subject][:2]
        shots = "".join(f"{text(dev, j)} {'ABCD'[dev['answer'][j]]}\n\n" for j in solved)
        yield shots + text(test, i), list("ABCD"), test["answer"][i]


def test_mmlu_is_scored_as_whole_sequences_are(qwen):
    root, config, results = qwen
    answers = expert_answers(root, config, "mmlu")
    want = np.mean([chosen == label for chosen, label, _ in answers])
    assert results["individual"]["mmlu"] == pytest.approx(want, abs=1e-6)


def test_truthfulqa_is_scored_as_whole_sequences_are(qwen):
    root, config, results = qwen
    answers = expert_answers(root, config, "truthfulqa")
    tokens = data.load_tokenizer(
        (root / "checkpoints" / config.experts.pretrained / "tokenizer.json").read_bytes(), 128
    )
    task = data.load_language_task(
        "truthfulqa",
        encode=tokens,
        root=root / "datasets",
        seed=config.data.seed,
        max_answer=config.language.max_answer,
    )
    test = task.splits["test"]
    held = {
        tuple(row[mask > 0])
        for row, mask in zip(test["input_ids"], test["attention_mask"], strict=True)
    }
    prompts = tokens.prefixes([prompt for *_, prompt in answers])
    kept = [
        chosen == label
        for (chosen, label, _), ids in zip(answers, prompts, strict=True)
        if tuple(ids) in held
    ]
    assert len(kept) == len(test["label"]) == 56
    assert results["individual"]["truthfulqa"] == pytest.approx(np.mean(kept), abs=1e-6)


def test_artefact_of_questions_has_no_heads(qwen):
    root, config, _ = qwen
    released = release.load(root / "workdir")
    assert released.heads == {task: {} for task in config.tasks}
    with pytest.raises(ValueError, match=r"'mmlu'.*have no heads"):
        serving.Recovered.load(root / "workdir", offline=True)


def test_released_artefact_is_evaluated_alike_without_the_experts(qwen, monkeypatch):
    root, config, results = qwen
    printed = {}
    experts = [root / "checkpoints" / name for name in config.experts.repositories]
    with tiny.world(root / "cache"), monkeypatch.context() as patch:
        artifact = SimpleNamespace(value=str(root / "workdir"))
        patch.setattr(evaluate, "_ARTIFACT", artifact, raising=False)
        patch.setattr(evaluate, "print_results", lambda *args: printed.update(rows=args[2]))
        for folder in experts:
            folder.rename(folder.with_name(f"{folder.name} elsewhere"))
        try:
            evaluate.main()
        finally:
            for folder in experts:
                folder.with_name(f"{folder.name} elsewhere").rename(folder)
    want = [row["accuracy"] for row in rows_by_kind(results)]
    assert [row["accuracy"] for row in printed["rows"]] == want


# What is missing is named at once


@pytest.mark.parametrize("name", ["roberta_base_glue8", "gpt2_glue7", "qwen_qa3"])
def test_dry_run_names_all_that_is_missing(name, tmp_path, capsys):
    config = stand_ins.small(name, tmp_path)
    with tiny.world(tmp_path / "cache"), pytest.raises(SystemExit) as stopped:
        train.dry_run(command_line.as_dict(config), tmp_path / "workdir")
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    for what in ("model: ", "disk: ", "memory: about ", "time: "):
        assert f"\n{what}" in printed
    for task in config.tasks:
        assert f"  tasks: {task}: no " in printed
    assert str(tmp_path / "datasets") in printed
    for repository in (config.experts.pretrained, *config.experts.repositories):
        owner_and_name, _, inside = (
            "/".join(repository.split("/")[:2]),
            "",
            repository.split("/")[2:],
        )
        include = f" --include '{'/'.join(inside)}/*'" if inside else ""
        folder = tmp_path / "checkpoints" / owner_and_name
        assert f"hf download {owner_and_name}{include} --local-dir {folder}" in printed


def test_dry_run_of_what_is_whole(roberta, capsys):
    root, config, _ = roberta
    with tiny.world(root / "cache"), pytest.raises(SystemExit) as stopped:
        train.dry_run(command_line.as_dict(config), root / "unused")
    assert (stopped.value.code, "is here" in capsys.readouterr().out) == (0, True)


def problems(config, root, *changes):
    settings = copy.deepcopy(command_line.as_dict(config))
    for path, value in changes:
        *above, name = path.split(".")
        node = settings
        for part in above:
            node = node[part]
        node[name] = value
    with tiny.world(root / "cache"):
        return "\n".join(preflight.missing(settings))


def test_settings_that_do_not_fit_are_named(roberta):
    root, config, _ = roberta
    found = problems(
        config,
        root,
        ("language.metrics", {"cola": "acuracy", "stsb": "accuracy", "dots": "f1"}),
        ("model.max_length", 25),
    )
    assert "language.metrics.cola: got 'acuracy'" in found and "did you mean 'accuracy'" in found
    assert "language.metrics.stsb: 'accuracy' does not suit the task's labels" in found
    assert "language.metrics.dots: no language task of the experiment" in found
    assert "model.max_length: got 25, expected at most the model's 24" in found


def test_questions_need_a_language_model(roberta):
    root, config, _ = roberta
    found = problems(config, root, ("tasks", [*config.tasks[:7], "mmlu"]), ("language.shots", -1))
    assert "tasks: ['mmlu'] are questions, expected all tasks or none to be" in found
    assert "tasks: ['mmlu'] are questions, expected causal language models with a head" in found
    assert "language.max_answer: got 64, expected 1 to 23" in found
    assert "language.shots: got -1" in found


def test_missing_tokenizer_is_named(tmp_path):
    config = stand_ins.small("gpt2_glue7", tmp_path)
    config.tasks = ("cola",)
    config.experts.repositories = config.experts.repositories[:1]
    stand_ins.write_glue(tmp_path / "datasets", ("cola",))
    stand_ins.write_classifiers(tmp_path / "checkpoints", config)
    (tmp_path / "checkpoints" / config.experts.pretrained / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in problems(config, tmp_path)


def test_head_of_another_task_is_refused(tmp_path):
    config = stand_ins.small("gpt2_glue7", tmp_path)
    config.tasks = ("cola", "mnli")
    config.experts.repositories = config.experts.repositories[:2]
    stand_ins.write_glue(tmp_path / "datasets", config.tasks)
    stand_ins.write_classifiers(tmp_path / "checkpoints", config)
    config.experts.repositories = (config.experts.repositories[1], config.experts.repositories[0])
    found = problems(config, tmp_path)
    assert "experts: the head of cola has 3 outputs, expected 2" in found
    with (
        tiny.world(tmp_path / "cache"),
        pytest.raises(ValueError, match=r"head of cola has 3 outputs, expected 2\n.*mnli has 2"),
    ):
        train.train(config, tmp_path / "workdir")
