"""Draws every picture of the package, as SVG text.

Each figure function takes plain arrays, mappings and sequences and returns one self-contained SVG
element (no XML prolog, no outside reference), so that it can stand in a file of its own or inside
an HTML page. Text stays text: it can be searched, and a page may set its font. Every figure is 360
points wide: shown at 360 px its letters are 7.5 to 9 px high.
"""

from retex_jax.plots.accuracy import accuracy_bars, bytes_accuracy
from retex_jax.plots.canvas import bytes_text, check_available, finite, protocol, seconds_text
from retex_jax.plots.diagnostics import by_layer, confusion, spectra, times
from retex_jax.plots.fronts import families, fronts
from retex_jax.plots.histograms import histogram

__all__ = [
    "accuracy_bars",
    "by_layer",
    "bytes_accuracy",
    "bytes_text",
    "check_available",
    "confusion",
    "families",
    "finite",
    "fronts",
    "histogram",
    "protocol",
    "seconds_text",
    "spectra",
    "times",
]
