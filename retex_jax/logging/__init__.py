"""What a run tells people: messages, tables, progress, metric files; and the lock on its workdir.

Terminal output goes through `rich`: live on a terminal, plain lines when piped. Messages and
progress go to stderr, tables to stdout. In a multi-process run only process 0 speaks and writes.
"""

from retex_jax.logging.clock import Clock
from retex_jax.logging.metric_writer import MetricWriter
from retex_jax.logging.progress_bar import Progress, progress
from retex_jax.logging.provenance import commit, device
from retex_jax.logging.terminal import info, table, warning
from retex_jax.logging.workdir import WorkdirLock, peak_rss_bytes

__all__ = [
    "Clock",
    "MetricWriter",
    "Progress",
    "WorkdirLock",
    "commit",
    "device",
    "info",
    "peak_rss_bytes",
    "progress",
    "table",
    "warning",
]
