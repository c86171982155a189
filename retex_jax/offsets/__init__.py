"""ReTeX: per-task offsets that recover each expert from the merged model."""

from retex_jax.offsets.extension import add_task, remove_task
from retex_jax.offsets.fit import fit
from retex_jax.offsets.state import FitReport, OffsetState, mix, offset_bytes, recover
from retex_jax.offsets.summary import by_kind

__all__ = [
    "FitReport",
    "OffsetState",
    "add_task",
    "by_kind",
    "fit",
    "mix",
    "offset_bytes",
    "recover",
    "remove_task",
]
