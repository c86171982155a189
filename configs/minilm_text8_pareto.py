"""Accuracy against bytes on the eight text tasks of minilm_text8, from 0.15% to 4% of the model a task.

    python -m retex_jax.compare --config=configs/minilm_text8_pareto.py

Offsets of our own form and of the paper's (with the shared factor on either side), and DTS, on the experts of
configs/minilm_text8.py. Hardware: two CPU cores; half an hour once the experts are there.
"""

from ml_collections import ConfigDict

from configs import common, minilm_text8


def get_config() -> ConfigDict:
    """The experiment."""
    return common.pareto(minilm_text8.get_config())
