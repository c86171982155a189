"""Qwen-14B and three tasks of question answering, MMLU, TruthfulQA and BBQ, from Twin-Merging's public checkpoints.

    python -m retex_jax.train --config=configs/qwen_qa3.py

Needs `pip install 'retex_jax[hub,language]'`. checkpoints/ holds Qwen-14B and the experts, datasets/ the questions;
--dry_run names what is missing, with the command that gets each. The first Qwen comes without a tokenizer.json: one of
the same vocabulary, such as that of Qwen/Qwen1.5-14B, is to be put beside its weights (that they agree was not checked
here). Sweeps: see configs/common.py.

Checkpoints: Qwen/Qwen-14B and lu-vae/qwen-dolly (for MMLU), lu-vae/qwen-truthfulqa-merged and lu-vae/qwen-bbq-merged of
the Hugging Face hub, those of Twin-Merging (arXiv:2406.15479).

Hardware: one machine with an accelerator, 113.3 GB of disk for the snapshots and 119.2 GB of memory on the device. The
experts are read leaf by leaf, but the merged model, an expert and the offsets have to fit; 14.2 billion parameters are
28 GB in bfloat16, a model.

Time: not measured, for want of the checkpoints and the data. 2.1e19 operations of the model at full length, which takes
an H200, which has that memory, 6 hours by its data sheet (9.89e14 a second in bfloat16); most questions are shorter,
and solving comes on top. --dry_run says both for the machine at hand.

A smaller Qwen2, or any decoder, has the same command:
`--config.experts.pretrained=... --config.experts.repositories="('a/b', 'c/d', 'e/f')"`.

Expected: DTS, Table 3: individual experts MMLU 68.36, TruthfulQA 54.35, BBQ 93.53, mean 72.08; Weight Averaging 66.48,
Task Arithmetic 66.08, TIES 67.13, EMR 70.49, DTS-D 71.81. That table counts generated letters that match exactly
(HELM); here answers are chosen by log-likelihood, TruthfulQA's by their texts (MC1), see `retex_jax.data.questions`. So
its TruthfulQA is another measure, and the ratios to the experts are what compares. ReTeX has no table of Qwen.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.get_config()
    config.name = "qwen_qa3"
    config.model.name = "huggingface"
    config.model.max_length = 2048
    config.model.options = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    config.tasks = ("mmlu", "truthfulqa", "bbq")
    config.data.max_test = None
    config.data_sets.root = "datasets"
    config.experts.root = "checkpoints"
    config.experts.pretrained = "Qwen/Qwen-14B"
    config.experts.repositories = (
        "lu-vae/qwen-dolly",  # of MMLU
        "lu-vae/qwen-truthfulqa-merged",
        "lu-vae/qwen-bbq-merged",
    )
    config.offsets.rank = 256
    config.identifier.num_calibration = 128  # TruthfulQA has 163 questions to spare
    config.evaluate.batch_size = 8
    return config
