"""ReTeX: per-task offsets that recover each expert from the merged model."""

from retex_jax.offsets.extension import add_task, remove_task
from retex_jax.offsets.fit import fit
from retex_jax.offsets.memory import normalized_memory
from retex_jax.offsets.sharded import fit_sharded, gather
from retex_jax.offsets.state import FitReport, OffsetState, mix, offset_bytes, recover
from retex_jax.offsets.summary import by_kind, kind_of

__all__ = [
    "FitReport",
    "OffsetState",
    "add_task",
    "by_kind",
    "fit",
    "fit_sharded",
    "gather",
    "kind_of",
    "mix",
    "normalized_memory",
    "offset_bytes",
    "recover",
    "remove_task",
]
