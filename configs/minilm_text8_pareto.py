"""Accuracy against bytes on the eight text tasks of minilm_text8, from 0.15% to 4% of the model a task.

    python -m retex_jax.compare --config=configs/minilm_text8_pareto.py

Offsets of our own form and of the paper's (with the shared factor on either side), and DTS, on the experts of
configs/minilm_text8.py. Hardware: two CPU cores; half an hour once the experts are there.
"""

from ml_collections import ConfigDict

from configs import common, minilm_text8


def get_config() -> ConfigDict:
    """The experiment."""
    config = minilm_text8.get_config()
    config.name = "minilm_text8_pareto"
    config.methods = "retex,dts_t"
    config.offsets.rank = 16
    config.offsets.extra_ranks = (1, 2, 4, 8)
    fractions = (0.0025, 0.005, 0.01, 0.02, 0.04)
    config.extra_variants = (
        *common.budgeted(0.0015, *fractions),
        *(("retex", {"rank": rank, "orientation": "auto"}) for rank in (1, 2, 4, 8, 16)),
        *(("dts_t", {"amr": fraction}) for fraction in fractions),
    )
    return config
