"""What weights of leaves and tasks buy offsets by budget, on the eight text tasks of minilm_text8.

    python -m retex_jax.compare --config=configs/minilm_text8_weights.py

Leaves by the Fisher information of the experts on 32 unlabelled training inputs a task; at a quarter of a percent
tasks as well, by the divergence of their predictions on 256. On experts of three seeds of configs/minilm_text8.py; the
table has means, and the figure 95% intervals. Hardware: two CPU cores.
"""

from ml_collections import ConfigDict

from configs import common, minilm_text8


def get_config() -> ConfigDict:
    """The experiment."""
    return common.weights(minilm_text8.get_config())
