"""Data: packaged tasks read out of checked wheels, tokenising, and batches."""

from retex_jax.data.batching import (
    batch_indices,
    by_length,
    mixed_batches,
    padded_batches,
    take,
    trim,
)
from retex_jax.data.catalogue import TEXT_TASKS, VISION_TASKS
from retex_jax.data.loading import check_names, load_task, make_task
from retex_jax.data.tasks import Examples, Task, TaskSpec, split_indices
from retex_jax.data.tokenizer import load_tokenizer
from retex_jax.data.wheels import WHEELS, Wheel, cache_dir, cached, fetch, fetch_all, read_member

__all__ = [
    "TEXT_TASKS",
    "VISION_TASKS",
    "WHEELS",
    "Examples",
    "Task",
    "TaskSpec",
    "Wheel",
    "batch_indices",
    "by_length",
    "cache_dir",
    "cached",
    "check_names",
    "fetch",
    "fetch_all",
    "load_task",
    "load_tokenizer",
    "make_task",
    "mixed_batches",
    "padded_batches",
    "read_member",
    "split_indices",
    "take",
    "trim",
]
