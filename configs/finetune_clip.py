"""Fine-tuning of CLIP's vision tower on one of the papers' vision tasks, the zero-shot head frozen.

    python -m retex_jax.finetune --config=configs/finetune_clip.py --config.task=sun397

checkpoints/ holds the pretrained model, datasets/ the data set; --dry_run names what is missing, with the command that
gets it. The same command goes on with a run that was stopped.

Checkpoints: openai/clip-vit-base-patch32 of the Hugging Face hub; --config.experts.pretrained names another. The expert
is written to checkpoints/own/clip-vit-base-patch32_TASK, where configs/vit_b32_30.py looks for those that are not
public, and every suite of that model with `:own` behind its name, such as configs/vit_b32_8.py:own, for all.

The papers' setting (ReTeX, arXiv:2606.26902; Ilharco et al., arXiv:2212.04089): 2000 iterations of 128 images, AdamW of
1e-5 and decay 0.1, cosine decay after 200 steps of warm-up. A batch lies over all devices of the machine;
--config.finetune.accumulate=4 takes it in four parts, where memory is short.

Hardware: one machine with an accelerator, 5.4 GB of memory on the device.

Time: not measured, for want of weights and data. 6.6e15 operations of the model, less than a minute at what an A100's
data sheet has (3.12e14 a second in bfloat16), so that decoding 256 thousand images takes longest. --dry_run says it for
the machine at hand.

Expected: no figure, as other checkpoints have other ones. The individual experts of the paper's eight, fourteen and
twenty tasks are in the files of the suites (ReTeX, arXiv:2606.26902, Table 1).
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    return common.fine_tuning("finetune_clip", "openai/clip-vit-base-patch32", "sun397")
