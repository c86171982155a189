"""Data: packaged tasks read out of checked wheels, the papers' data sets, tokenising, and batches."""

from retex_jax.data.batching import (
    batch_indices,
    bucketed_indices,
    by_length,
    mixed,
    mixed_batches,
    overlapped,
    padded_batches,
    take,
    trim,
)
from retex_jax.data.catalogue import TEXT_TASKS, VISION_TASKS
from retex_jax.data.images import AUTOMATIC, Images, ahead, as_arrays, materialize
from retex_jax.data.language import (
    LANGUAGE_TASKS,
    WITHOUT_CLASSES,
    joined,
    load_language_task,
)
from retex_jax.data.loading import (
    check_names,
    data_set_problems,
    load_task,
    make_task,
    num_outputs,
    num_test,
    num_train,
)
from retex_jax.data.prepared import data_root
from retex_jax.data.published import load_published
from retex_jax.data.questions import QUESTIONS
from retex_jax.data.registry import DATA_SETS, DataSet
from retex_jax.data.tasks import Examples, Task, TaskSpec, split_indices
from retex_jax.data.tokenizer import Encoder, load_tokenizer
from retex_jax.data.wheels import WHEELS, Wheel, cache_dir, cached, fetch, fetch_all, read_member

__all__ = [
    "AUTOMATIC",
    "DATA_SETS",
    "LANGUAGE_TASKS",
    "QUESTIONS",
    "TEXT_TASKS",
    "VISION_TASKS",
    "WHEELS",
    "WITHOUT_CLASSES",
    "DataSet",
    "Encoder",
    "Examples",
    "Images",
    "Task",
    "TaskSpec",
    "Wheel",
    "ahead",
    "as_arrays",
    "batch_indices",
    "bucketed_indices",
    "by_length",
    "cache_dir",
    "cached",
    "check_names",
    "data_root",
    "data_set_problems",
    "fetch",
    "fetch_all",
    "joined",
    "load_language_task",
    "load_published",
    "load_task",
    "load_tokenizer",
    "make_task",
    "materialize",
    "mixed",
    "mixed_batches",
    "num_outputs",
    "num_test",
    "num_train",
    "overlapped",
    "padded_batches",
    "read_member",
    "split_indices",
    "take",
    "trim",
]
