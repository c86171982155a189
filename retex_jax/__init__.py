"""Merge fine-tuned experts into one model, and recover each expert from it.

The public names. Each is imported when it is first asked for, so that the processes that decode images
(`retex_jax.data.workers`) import no JAX; importing the package touches no device.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retex_jax import identifier, mergers, metrics, offsets, tree
    from retex_jax.experts import ExpertSet, task_vectors
    from retex_jax.methods import METHODS, Method
    from retex_jax.serving import Recovered

__version__ = "0.1.0"

# After each call OpenBLAS' threads wait for the next for 2^26 cycles, on cores that XLA needs meanwhile; it reads this
# when NumPy and SciPy are loaded. 2^14 cycles are enough between the calls of one factorisation.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "14")

__all__ = [
    "METHODS",
    "ExpertSet",
    "Method",
    "Recovered",
    "identifier",
    "mergers",
    "metrics",
    "offsets",
    "task_vectors",
    "tree",
]

_HOMES = {
    "METHODS": "methods",
    "ExpertSet": "experts",
    "Method": "methods",
    "Recovered": "serving",
    "task_vectors": "experts",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    return getattr(module, name) if name in _HOMES else module


def __dir__() -> list[str]:
    return [*globals(), *__all__]
