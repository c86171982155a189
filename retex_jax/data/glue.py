"""The eight tasks of GLUE (arXiv:1804.07461) that the papers merge, from local files.

Below the root, GLUE lies as one of

    glue/TASK/train-00000-of-00001.parquet, ...    the hub's nyu-mll/glue
    glue/TASK/2.0.0/...                            tensorflow-datasets' glue, as array_record

The labels of GLUE's test sets are not public. So what GLUE calls validation is the test split here, as in the papers'
code (MNLI: the matched one), and a part of GLUE's training set is held out as "val".

The metrics are those of the papers: Matthews correlation for CoLA, the mean of the two correlations for STS-B, and
accuracy for the others, MRPC and QQP among them (DTS, appendix C.1). On GPT-2 both papers have accuracy for CoLA too:
their figure for the expert, 76.8, is that of fusion_bench's classifier, which measures nothing else.
"""

import os
from dataclasses import dataclass

from retex_jax.data import prepared, tables
from retex_jax.data.tables import Table

LICENCE = "as GLUE's sources; see https://gluebenchmark.com"


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
      columns: of the text, or of the two.
      classes: in the order of the labels; () for a regression.
      num_train: examples of GLUE's training set.
      num_test: examples of the split that is tested on.
      metric: a name in `metrics.METRICS`.
      test: what GLUE calls the split that is tested on.
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    num_train: int
    num_test: int
    metric: str = "accuracy"
    test: str = "validation"


_SENTENCES = ("sentence1", "sentence2")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), 8_551, 1_043, "matthews"),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), 67_349, 872),
    "mrpc": GlueTask(_SENTENCES, ("not_equivalent", "equivalent"), 3_668, 408),
    "stsb": GlueTask(_SENTENCES, (), 5_749, 1_500, "pearson_spearman"),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), 363_846, 40_430),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        392_702,
        9_815,
        test="validation_matched",
    ),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment"), 104_743, 5_463),
    "rte": GlueTask(_SENTENCES, ("entailment", "not_entailment"), 2_490, 277),
}


def read(name: str, root: str | os.PathLike = "") -> dict[str, Table]:
    """Opens a task.

    Args:
      name: a key of `GLUE`.
      root: see `prepared.data_root`.

    Returns:
      "train" and "test" to their tables, with the task's columns and "label".

    Raises:
      FileNotFoundError: if there are no files, with the commands that get them.
      ImportError: if what reads them is not installed.
      ValueError: if splits are missing, or a file is damaged or lacks a column.
    """
    task = GLUE[name]
    splits = {"train": "train", "test": task.test}
    folder = prepared.data_root(root) / "glue"
    if files := prepared.find_parquet(folder, name):
        prepared.check_splits(folder / name, splits.values(), files)
        columns = (*task.columns, "label")
        return {ours: tables.Parquet(files[split], columns) for ours, split in splits.items()}
    found = prepared.find_tfds(f"glue/{name}", root)
    if found:
        builder = prepared.open_tfds(found, list(splits.values()))
        return {ours: tables.Rows(builder.as_data_source(split)) for ours, split in splits.items()}
    raise FileNotFoundError(
        f"{name}: no data in {folder / name}; get it with: "
        f"{prepared.hub_command('nyu-mll/glue', folder, name)}; or "
        f"{prepared.tfds_command(f'glue/{name}', root)}"
    )
