"""Accuracy against bytes on the eight image tasks of dinov2_vision8, from 0.15% to 4% of the model a task.

    python -m retex_jax.compare --config=configs/dinov2_vision8_pareto.py

Offsets of our own form and of the paper's (ReTeX, with the shared factor on either side, and ReTeX-E), DTS,
T-Switch and EMR, on experts of three seeds of configs/dinov2_vision8.py; the table has means, and the figure 95%
intervals. Hardware: two CPU cores; half an hour a seed once the experts are there.
"""

from ml_collections import ConfigDict

from configs import common, dinov2_vision8


def get_config() -> ConfigDict:
    """The experiment."""
    return common.pareto(dinov2_vision8.get_config())
