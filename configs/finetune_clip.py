"""Fine-tuning of CLIP's vision tower on one of the papers' vision tasks, the zero-shot head frozen.

    python -m retex_jax.finetune --config=configs/finetune_clip.py --config.task=sun397

checkpoints/ holds openai/clip-vit-base-patch32 (--config.experts.pretrained names another), datasets/ the data set;
what is missing is named, with the command that gets it. The expert is written to
checkpoints/own/clip-vit-base-patch32_TASK, where configs/vit_b32_30.py looks for those that are not public. The same
command goes on with a run that was stopped.

The papers' setting (ReTeX, arXiv:2606.26902; Ilharco et al., arXiv:2212.04089): 2000 iterations of 128 images, AdamW of
1e-5 and decay 0.1, cosine decay after 200 steps of warm-up. A batch lies over all devices of the machine;
--config.finetune.accumulate=4 takes it in four parts, where memory is short. Hardware: not run here, for want of
weights and data. Expected: no figure, as other checkpoints have other ones.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.get_config()
    config.name = "finetune_clip"
    config.task = "sun397"
    config.model.name = "huggingface"
    config.model.options = {"dtype": "bfloat16"}
    config.data.max_train = None
    config.data.max_val = 5000
    config.data.max_test = None
    config.data_sets.root = "datasets"
    config.experts.root = "checkpoints"
    config.experts.pretrained = "openai/clip-vit-base-patch32"
    config.finetune = {
        "steps": 2000,
        "batch_size": 128,
        "accumulate": 1,  # parts of a batch, taken one after the other
        "learning_rate": 1e-5,
        "weight_decay": 0.1,
        "warmup_steps": 200,
        "checkpoint_every": 200,
    }
    return config
