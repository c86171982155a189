"""CLIP ViT-B/16 and the eight vision tasks of the papers, from public checkpoints.

    python -m retex_jax.train --config=configs/vit_b16.py --config.experts.root=DIR

Hardware: one machine with 8 GiB of memory; no GPU is needed to merge and to fit the offsets. DIR holds one snapshot
folder a repository (config.json, model.safetensors), as `hf download REPOSITORY --local-dir
DIR/REPOSITORY` leaves it. --dry_run names what is missing. These are not the paper's own checkpoints, so its figures
are not expected figures: it reports 94.7 for the individual experts of its own set and 94.4 recovered at rank 256 with
the task known (ReTeX, arXiv:2606.26902, Table 1).
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.get_config()
    config.name = "vit_b16"
    config.model.name = "huggingface"
    config.tasks = (
        "sun397",
        "stanford-cars",
        "resisc45",
        "eurosat",
        "svhn",
        "gtsrb",
        "mnist",
        "dtd",
    )
    config.experts.root = "checkpoints"
    config.experts.pretrained = "openai/clip-vit-base-patch16"
    config.experts.repositories = tuple(
        f"tanganke/clip-vit-base-patch16_{task}" for task in config.tasks
    )
    config.offsets.rank = 256
    return config
