"""Fine-tuning of RoBERTa-base on one of the eight tasks of GLUE that the papers merge.

    python -m retex_jax.finetune --config=configs/finetune_roberta.py --config.task=cola

Needs `pip install 'retex_jax[language]'`. checkpoints/ holds the pretrained model, datasets/ GLUE; --dry_run names what
is missing, with the command that gets it. The same command goes on with a run that was stopped.

Checkpoints: FacebookAI/roberta-base of the Hugging Face hub. The expert, a RobertaForSequenceClassification with its
tokenizer, is written to checkpoints/own/roberta-base_TASK, where `--config=configs/roberta_base_glue8.py:own` looks for
all eight.

The papers do not state how their experts were made: they take public ones, whose folders are named as the code of
MergeLM (arXiv:2311.03099) names them. The settings here are that code's, github.com/yule-BUAA/MergeLM,
train_plms_glue.py, with the learning rates of inference_plms_glue.py: 10 epochs of nine tenths of the training set in
batches of 16, cut to 128 tokens; AdamW of 1e-5, on MRPC 5e-5, decay 0.01 but for biases and norms; linear decay after
6% of warm-up; of the parameters after each epoch those that are best on the tenth held out. It differs in that our
models have no dropout, that batches are drawn by length (`finetune.bucket`; 1 draws them as they come), that at most
5000 examples are held out, and that MRPC and QQP choose by accuracy (there: the mean of accuracy and F1). A batch lies
over all devices of the machine, so it is a multiple of them.

Hardware: one machine with an accelerator, 3.8 GB of memory on the device.

Time: not measured, for want of weights and data. MNLI's 10 epochs are 240 thousand steps, CoLA's 4.8 thousand: 5.2e15
operations of the model at full length, less than a minute at what an A100's data sheet has (3.12e14 a second in
bfloat16), which batches of 16 do not reach. --dry_run says it for the machine at hand.

Expected: no figure, as other checkpoints have other ones; the public experts reach CoLA .6018, SST-2 .9404, MRPC .8922,
STS-B .9063, QQP .9141, MNLI .8720, QNLI .9271, RTE .7906 (ReTeX, arXiv:2606.26902, Table 3).
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The experiment."""
    config = common.fine_tuning("finetune_roberta", "FacebookAI/roberta-base", "cola")
    config.model.max_length = 128
    config.finetune.update(
        steps=0,
        epochs=10.0,
        batch_size=16,
        bucket=32,
        learning_rate=1e-5,
        learning_rates={"mrpc": 5e-5},
        weight_decay=0.01,
        decay_vectors=False,
        schedule="linear",
        warmup=0.06,
        keep_best=True,
        checkpoint_every=500,
    )
    return config
