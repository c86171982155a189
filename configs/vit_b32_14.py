"""CLIP ViT-B/32 and the papers' fourteen vision tasks, from public checkpoints.

    python -m retex_jax.train --config=configs/vit_b32_14.py --config.experts.root=DIR --config.data_sets.root=DATA

DIR holds one snapshot folder a repository, as `hf download REPOSITORY --local-dir DIR/REPOSITORY` leaves it; DATA one
folder a data set, or what tensorflow-datasets prepared. --dry_run names what is missing of both and the command that
gets it, and downloads nothing.

Hardware: one machine; the snapshots take 4.9 GB on disk. Not run here, for want of the checkpoints and the data;
--dry_run says which memory and time it takes on the machine at hand. Sweeps of rank, d_emb and seeds: see
configs/common.py.

Expected: the paper reports, of its own checkpoints at rank 256, 90.9 for the individual experts, 64.3 for Weight
Averaging, 90.6 recovered with the task known and 89.8 with the task unknown (ReTeX, arXiv:2606.26902, Tables 1 and 2;
% accuracy). The public checkpoints are other ones, so these are no targets.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(experts: str = "") -> ConfigDict:
    """The experiment; experts: "" for the public ones, "own" for those of configs/finetune_clip.py."""
    return common.vision_suite("vit_b32_14", "base-patch32", 14, experts)
