"""GPT-2 and seven tasks of GLUE, from the public checkpoints that the papers' tables rest on.

    python -m retex_jax.train --config=configs/gpt2_glue7.py

Needs `pip install 'retex_jax[hub,language]'`. checkpoints/ holds gpt2 and the experts, datasets/ holds GLUE; --dry_run
names what is missing, with the command that gets each. Test inputs are GLUE's whole validation sets (58 thousand), cut
to 512 tokens as in the code that trained the experts (fusion_bench); the two texts of a pair follow each other without
a separator, and the last token is classified. Sweeps: see configs/common.py.

Checkpoints: openai-community/gpt2 and tanganke/gpt2_TASK of the Hugging Face hub, those of FusionBench
(arXiv:2406.03280).

Hardware: one machine with an accelerator, 4.0 GB of disk for the snapshots and 5.0 GB of memory on the device.

Time: not measured, for want of the checkpoints and the data. 4.0e16 operations of the model at full length, which takes
an A100 34 minutes by its data sheet (1.95e13 a second in float32); solving comes on top. --dry_run says both for the
machine at hand.

Expected: ReTeX (arXiv:2606.26902), Table 8, with the task known: individual experts CoLA 76.8, MNLI 82.1, MRPC 80.4,
QNLI 88.3, QQP 89.6, RTE 65.3, SST-2 91.2, mean 82.0; Weight Averaging 56.1, Task Arithmetic 70.0, TIES 70.0, EMR 80.4,
ReTeX 81.7. DTS, Table 8, has 81.94 for the same experts, DTS-D 81.80. All seven are accuracies, CoLA's too.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(experts: str = "") -> ConfigDict:
    """The experiment; experts: "" for the public ones, "own" for those of configs/finetune_gpt2.py."""
    config = common.get_config()
    config.name = "gpt2_glue7"
    config.model.name = "huggingface"
    config.model.max_length = 512
    config.tasks = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2")
    config.data.max_test = None
    config.data_sets.root = "datasets"
    config.language.metrics = {"cola": "accuracy"}
    config.experts.root = "checkpoints"
    config.experts.pretrained = "openai-community/gpt2"
    config.experts.repositories = tuple(f"tanganke/gpt2_{task}" for task in config.tasks)
    config.offsets.rank = 256
    return common.own(config, experts)
