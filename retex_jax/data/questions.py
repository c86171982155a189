"""Question answering from local files: MMLU, TruthfulQA (MC1) and BBQ, as prompts with answers to choose from.

Below the root they lie as one of

    mmlu/all/test-00000-of-00001.parquet, validation-..., dev-...      the hub's cais/mmlu (arXiv:2009.03300)
    truthful_qa/multiple_choice/validation-00000-of-00001.parquet      the hub's truthfulqa/truthful_qa
    truthful_qa/data/mc_task.json                                      the authors' repository (arXiv:2109.07958)
    bbq/data/Age.jsonl and ten more                                    the authors' repository (arXiv:2110.08193)

The prompts; an answer begins with a blank, and "_" stands for it here:

- MMLU and BBQ: "Question: ...", a line "A. ..." for each answer, and "Answer:"; the answers are the letters, "_A".
  BBQ has a line "Passage: ..." before. MMLU begins with solved questions of the same subject, the first of its "dev"
  split, an empty line after each.
- TruthfulQA: "Q: ..." and "A:" on the next line; the answers are the texts, "_Paris". MC1: one of them is right.

An answer's score is the sum of its tokens' log-probabilities. Published figures differ in the prompt: the authors of
MMLU begin with a sentence that names the subject, those of TruthfulQA with six solved questions; and the tables of
Twin-Merging and DTS are of HELM (arXiv:2211.09110), which counts generated letters that match exactly, TruthfulQA with
letters too. What is compared is the same prompt with the expert, the merged model and the recovered expert.
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retex_jax.data import prepared, tables
from retex_jax.data.tokenizer import Encoder

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SUBJECTS = (
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


class Source(NamedTuple):
    """Of a task's data.

    Attributes:
      licence: under which they come.
      num_test: questions that are tested on.
    """

    licence: str
    num_test: int


QUESTIONS = {
    "mmlu": Source("MIT", 14_042),
    "truthfulqa": Source("Apache-2.0", 572),
    "bbq": Source("CC BY 4.0", 40_944),
}
"""The tasks."""


class Question(NamedTuple):
    """A question with answers to choose from.

    Attributes:
      shots: solved questions that stand before it, each with its empty line; the first are left out where they do
        not fit.
      prompt: the question, up to a colon.
      answers: what may follow, each with its blank.
      label: the right one.
      group: its name; questions of one group are near copies of each other.
    """

    shots: tuple[str, ...]
    prompt: str
    answers: tuple[str, ...]
    label: int
    group: str


def read(name: str, root: str | os.PathLike = "", shots: int = 5) -> dict[str, list[Question]]:
    """Reads a task.

    Args:
      name: a key of `QUESTIONS`.
      root: see `prepared.data_root`.
      shots: solved questions before each question of MMLU, at most.

    Returns:
      "train" and "test" to their questions; "all" where the source has one split only.

    Raises:
      FileNotFoundError: if files are missing, with the command that gets them.
      ImportError: if what reads them is not installed.
      ValueError: if splits are missing, a file is damaged, or a question has no right answer.
    """
    folder = prepared.data_root(root)
    if name == "mmlu":
        found = _read_mmlu(folder / "mmlu", shots)
    elif name == "truthfulqa":
        found = {"all": _read_truthfulqa(folder / "truthful_qa")}
    else:
        found = {"all": _read_bbq(folder / "bbq")}
    wrong = [q.prompt for qs in found.values() for q in qs if not 0 <= q.label < len(q.answers)]
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} questions have no right answer, the first: {wrong[0]!r}"
        )
    return found


def encode(
    questions: Sequence[Question], encoder: Encoder, max_answer: int
) -> dict[str, np.ndarray]:
    """Tokenises questions; a prompt that is too long loses its first solved questions, then its first tokens.

    Args:
      questions: n of them.
      encoder: its max_length is what a prompt and its answer may have together.
      max_answer: tokens of an answer, at most; so a prompt may have max_length - max_answer.

    Returns:
      "input_ids" and "attention_mask" int32 [n, L] as long as the longest prompt; "choice_ids" and "choice_mask"
      int32 [n, C, T]; "label" int32 [n].

    Raises:
      ValueError: if an answer has no token or more than max_answer, or no prompt fits.
    """
    room = encoder.max_length - max_answer
    if room < 1 or max_answer < 1:
        raise ValueError(
            f"max_answer={max_answer}: expected 1 to max_length - 1 = {encoder.max_length - 1}"
        )
    whole = encoder.prefixes(["".join(q.shots) + q.prompt for q in questions])
    prompts = [_fit(q, ids, encoder, room) for q, ids in zip(questions, whole, strict=True)]
    flat = encoder.continuations([answer for q in questions for answer in q.answers], after=":")
    if wrong := [ids for ids in flat if not 1 <= len(ids) <= max_answer]:
        raise ValueError(
            f"max_answer={max_answer}: {len(wrong)} answers have no token or more, up to "
            f"{max(map(len, wrong))}"
        )
    input_ids, attention_mask = _pad(prompts, encoder.pad_id)
    choice_ids, choice_mask = _pad(flat, encoder.pad_id)
    counts = np.array([len(question.answers) for question in questions])
    place = np.arange(counts.max()) < counts[:, None]
    shape = (*place.shape, choice_ids.shape[1])
    choices = {}
    for key, rows in (("choice_ids", choice_ids), ("choice_mask", choice_mask)):
        choices[key] = np.zeros(shape, np.int32)
        choices[key][place] = rows
    labels = np.array([question.label for question in questions], np.int32)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        **choices,
        "label": labels,
    }


def _fit(question: Question, ids: list[int], encoder: Encoder, room: int) -> list[int]:
    first = 0
    while len(ids) > room and first < len(question.shots):
        first += 1
        [ids] = encoder.prefixes(["".join(question.shots[first:]) + question.prompt])
    return ids[-room:]


def _pad(rows: Sequence[list[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int32)
    ids[mask] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return ids, mask.astype(np.int32)


def _lettered(question: str, answers: Sequence[str], passage: str = "") -> str:
    before = [f"Passage: {passage.strip()}"] if passage else []
    lines = [
        f"{letter}. {str(answer).strip()}"
        for letter, answer in zip(_LETTERS, answers, strict=False)
    ]
    return "\n".join([*before, f"Question: {question.strip()}", *lines, "Answer:"])


def _letters(answers: Sequence[str]) -> tuple[str, ...]:
    return tuple(f" {letter}" for letter in _LETTERS[: len(answers)])


def _read_hub(
    name: str, folder: Path, repository: str, splits: Sequence[str], columns: Sequence[str]
) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of splits of "OWNER/NAME:CONFIGURATION", tuples of the named columns."""
    repository, _, configuration = repository.partition(":")
    files = prepared.find_parquet(folder, configuration)
    if not files:
        raise FileNotFoundError(
            f"{name}: no data in {folder / configuration}; get it with: "
            f"{prepared.hub_command(repository, folder, configuration)}"
        )
    prepared.check_splits(folder / configuration, splits, files)
    found = {split: tables.Parquet(files[split], columns) for split in splits}
    return {
        split: list(zip(*table.take(np.arange(len(table)), columns), strict=True))
        for split, table in found.items()
    }


def _read_mmlu(folder: Path, shots: int) -> dict[str, list[Question]]:
    columns = ("question", "subject", "choices", "answer")
    splits = ("validation", "test", "dev")
    rows = _read_hub("mmlu", folder, "cais/mmlu:all", splits, columns)
    solved: dict[str, list[str]] = defaultdict(list)
    for question, subject, choices, answer in rows["dev"]:
        solved[subject].append(f"{_lettered(question, choices)} {_LETTERS[answer]}\n\n")

    def questions(split: str) -> list[Question]:
        return [
            Question(
                tuple(solved[subject][:shots]),
                _lettered(question, choices),
                _letters(choices),
                int(answer),
                question,
            )
            for question, subject, choices, answer in rows[split]
        ]

    return {"train": questions("validation"), "test": questions("test")}


def _read_truthfulqa(folder: Path) -> list[Question]:
    path = folder / "data/mc_task.json"
    if path.is_file():
        targets = [
            (entry["question"], list(entry["mc1_targets"]), list(entry["mc1_targets"].values()))
            for entry in json.loads(path.read_text(encoding="utf-8"))
        ]
    else:
        repository = "truthfulqa/truthful_qa:multiple_choice"
        columns = ("question", "mc1_targets")
        rows = _read_hub("truthfulqa", folder, repository, ("validation",), columns)
        targets = [(text, given["choices"], given["labels"]) for text, given in rows["validation"]]
    return [
        Question(
            (),
            f"Q: {question.strip()}\nA:",
            tuple(f" {answer.strip()}" for answer in answers),
            labels.index(1) if labels.count(1) == 1 else -1,
            question,
        )
        for question, answers, labels in targets
    ]


def _read_bbq(folder: Path) -> list[Question]:
    paths = [folder / "data" / f"{subject}.jsonl" for subject in _SUBJECTS]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"bbq: no {', '.join(missing)} in {folder / 'data'}; get it with: "
            f"git clone https://github.com/nyu-mll/BBQ {folder}"
        )
    questions = []
    for row in tables.read_json_lines(paths):
        answers = [row["ans0"], row["ans1"], row["ans2"]]
        prompt = _lettered(row["question"], answers, row["context"])
        group = f"{row['category']} {row['question_index']}"
        questions.append(Question((), prompt, _letters(answers), int(row["label"]), group))
    return questions
