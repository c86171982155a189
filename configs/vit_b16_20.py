"""CLIP ViT-B/16 and the papers' twenty vision tasks, from public checkpoints.

    python -m retex_jax.train --config=configs/vit_b16_20.py --config.experts.root=DIR --config.data_sets.root=DATA

DIR holds one snapshot folder a repository, as `hf download REPOSITORY --local-dir DIR/REPOSITORY` leaves it; DATA one
folder a data set, or what tensorflow-datasets prepared. --dry_run names what is missing of both and the command that
gets it, and downloads nothing.

Checkpoints: openai/clip-vit-base-patch16 and tanganke/clip-vit-base-patch16_TASK of the Hugging Face hub, those of
FusionBench (arXiv:2406.03280).

Hardware: one machine with an accelerator, 7.2 GB of disk for the snapshots and 3.6 GB of memory on the device.

Time: not measured, for want of the checkpoints and the data. 5.7e16 operations of the model, at least 49 minutes of an
A100 by its data sheet (1.95e13 a second in float32); decoding and solving come on top. --dry_run says both for the
machine at hand.

Sweeps of rank, d_emb and seeds: see configs/common.py.

Expected: the paper reports, of its own checkpoints at rank 256, 92.8 for the individual experts, 65.3 for Weight
Averaging and 91.3 with the task unknown (ReTeX, arXiv:2606.26902, Table 1; % accuracy). The public checkpoints are
other ones, so these are no targets.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(experts: str = "") -> ConfigDict:
    """The experiment; experts: "" for the public ones, "own" for those of configs/finetune_clip.py."""
    return common.vision_suite("vit_b16_20", "base-patch16", 20, experts)
