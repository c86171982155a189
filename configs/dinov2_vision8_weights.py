"""What weights of leaves and tasks buy offsets by budget, on the eight image tasks of dinov2_vision8.

    python -m retex_jax.compare --config=configs/dinov2_vision8_weights.py

Leaves by the Fisher information of the experts on 32 unlabelled training inputs a task; at a quarter of a percent
tasks as well, by the divergence of their predictions on 256. On experts of three seeds of configs/dinov2_vision8.py;
the table has means, and the figure 95% intervals. Hardware: two CPU cores; a quarter of an hour a seed once the experts
are there.
"""

from ml_collections import ConfigDict

from configs import common, dinov2_vision8


def get_config() -> ConfigDict:
    """The experiment."""
    return common.weights(dinov2_vision8.get_config())
