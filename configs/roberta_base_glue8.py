"""RoBERTa-base and the eight tasks of GLUE, from the public checkpoints that the papers' tables rest on.

    python -m retex_jax.train --config=configs/roberta_base_glue8.py

Needs `pip install 'retex_jax[hub,language]'`. checkpoints/ holds roberta-base and the experts, datasets/ holds GLUE;
--dry_run names what is missing, with the command that gets each. Test inputs are GLUE's whole validation sets (60
thousand), cut to 128 tokens as in the code that trained the experts (MergeLM). Sweeps: see configs/common.py.

Checkpoints: FacebookAI/roberta-base and vanillaOVO/roberta_base_glue_ckpts of the Hugging Face hub, one folder a task,
as MergeLM (arXiv:2311.03099) names them. The experts' repository holds pickles: --dry_run says of each that it is to be
written as safetensors.

Hardware: one machine with an accelerator, 4.5 GB of disk for the snapshots and 5.5 GB of memory on the device.

Time: not measured, for want of the checkpoints and the data. 9.4e15 operations of the model at full length, which takes
an A100 8 minutes by its data sheet (1.95e13 a second in float32); solving comes on top. --dry_run says both for the
machine at hand.

Expected: ReTeX (arXiv:2606.26902), Table 3, with the task known: individual experts CoLA .6018, SST-2 .9404, MRPC
.8922, STS-B .9063, QQP .9141, MNLI .8720, QNLI .9271, RTE .7906, mean .8556 (the same in DTS, Table 2); Task Arithmetic
.6665, TIES .6404, EMR .8018, ReTeX .8453. With the task unknown: Weight Averaging .5134, ReTeX .8145. The rank of that
table is not stated; 256 is the paper's default. Matthews correlation for CoLA, the mean of Pearson's and Spearman's for
STS-B, accuracy for the rest.
"""

from ml_collections import ConfigDict

from configs import common

# The learning rate is part of the folder's name.
_RATES = {"mrpc": "5e-05"}


def get_config(experts: str = "") -> ConfigDict:
    """The experiment; experts: "" for the public ones, "own" for those of configs/finetune_roberta.py."""
    config = common.get_config()
    config.name = "roberta_base_glue8"
    config.model.name = "huggingface"
    config.model.max_length = 128
    config.tasks = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
    config.data.max_test = None
    config.data_sets.root = "datasets"
    config.experts.root = "checkpoints"
    config.experts.pretrained = "FacebookAI/roberta-base"
    config.experts.repositories = tuple(
        f"vanillaOVO/roberta_base_glue_ckpts/{task}/roberta-base_lr{_RATES.get(task, '1e-05')}"
        for task in config.tasks
    )
    config.offsets.rank = 256
    config.method_options.t_switch = {"drop": 0.7}
    return common.own(config, experts)
