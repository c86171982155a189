"""Fine-tuning of GPT-2 on one of the seven tasks of GLUE that the papers merge.

    python -m retex_jax.finetune --config=configs/finetune_gpt2.py --config.task=cola

Needs `pip install 'retex_jax[language]'`. checkpoints/ holds the pretrained model, datasets/ GLUE; --dry_run names what
is missing, with the command that gets it. The same command goes on with a run that was stopped.

Checkpoints: openai-community/gpt2 of the Hugging Face hub. The expert, a GPT2ForSequenceClassification with its
tokenizer, is written to checkpoints/own/gpt2_TASK, where `--config=configs/gpt2_glue7.py:own` looks for all seven.

The papers do not state how their experts were made: they take those of FusionBench (arXiv:2406.03280), whose
documentation (github.com/tanganke/fusion_bench, docs/modelpool/gpt2_classification.md) says a learning rate of 5e-5 for
3 epochs. Batch size, schedule, warm-up and decay are not stated there; here they are what transformers' Trainer has
where nothing is given: 8, linear to 0, none, none. The texts are cut to 512 tokens, as in that code. Our models have no
dropout; batches are drawn by length (`finetune.bucket`; 1 draws them as they come), and a tenth of the training set,
at most 5000, is held out. A batch lies over all devices of the machine, so it is a multiple of them.

Hardware: one machine with an accelerator, 5.6 GB of memory on the device.

Time: not measured, for want of weights and data. MNLI's 3 epochs are 145 thousand steps, CoLA's 2.9 thousand: 6.7e15
operations of the model at full length, less than a minute at what an A100's data sheet has (3.12e14 a second in
bfloat16), which batches of 8 do not reach. --dry_run says it for the machine at hand.

Expected: no figure, as other checkpoints have other ones; FusionBench's experts reach CoLA
76.8, MNLI 82.1, MRPC 80.4, QNLI 88.3, QQP 89.6, RTE 65.3, SST-2 91.2, all of them accuracies (ReTeX, arXiv:2606.26902,
Table 8).
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.fine_tuning("finetune_gpt2", "openai-community/gpt2", "cola")
    config.model.max_length = 512
    config.language.metrics = {"cola": "accuracy"}
    config.finetune.update(
        steps=0,
        epochs=3.0,
        batch_size=8,
        bucket=32,
        learning_rate=5e-5,
        weight_decay=0.0,
        decay_vectors=False,
        schedule="linear",
        warmup=0.0,
        checkpoint_every=500,
    )
    return config
