"""What the experiments have in common; each experiment file changes what it is about.

Sweeps, with the name of any suite:

    python -m retex_jax.train --config=configs/SUITE.py --config.offsets.extra_ranks="(16, 64, 128)"
    python experiments/retex_figure_3.py --suite=SUITE       # rank, over three merged models
    python experiments/retex_figure_4.py --suite=SUITE       # d_emb, the size of the task embeddings
    python -m retex_jax.compare --config=configs/SUITE.py --config.num_seeds=5      # of methods that are random
    python -m retex_jax.compare --config=configs/SUITE.py --config.expert_seeds="(0, 1, 2)"   # of experts made here

Experts that are snapshots have no seeds; others of theirs are other repositories.
"""

from ml_collections import ConfigDict

BUDGETED = {
    "bits": 3,
    "vector_bits": 4,
    "sharing": "auto",
    "orientation": "auto",
    "task_weights": "energy",
}
"""Options of our own form beside its budget."""


def budgeted(*fractions: float) -> tuple[tuple[str, dict], ...]:
    """Offsets of our own form for `extra_variants`, by what they take of the model a task."""
    return tuple(("retex", {"budget": fraction, **BUDGETED}) for fraction in fractions)


def pareto(config: ConfigDict) -> ConfigDict:
    """An experiment's comparison at 0.15% to 4% of the model a task: our form, the paper's three, and DTS.

    T-Switch and EMR cannot be made that small; they are beside them at what they take.
    """
    config.name = f"{config.name}_pareto"
    config.methods = "weight_average,dts_t,t_switch,emr,retex"
    config.expert_seeds = (0, 1, 2)
    config.offsets.rank = 16
    config.offsets.extra_ranks = (1, 2, 4, 8)
    fractions = (0.0025, 0.005, 0.01, 0.02, 0.04)
    config.extra_variants = (
        *budgeted(0.0015, *fractions),
        *(("retex", {"rank": rank, "orientation": "auto"}) for rank in (1, 2, 4, 8, 16)),
        *(
            ("retex", {"form": "factorized", "rank": rank, "task_rank": task_rank})
            for rank, task_rank in ((2, 1), (8, 1), (16, 2), (32, 4), (64, 8))
        ),
        *(("dts_t", {"amr": fraction}) for fraction in fractions),
    )
    return config


def weights(config: ConfigDict) -> ConfigDict:
    """What weights of leaves and tasks buy: our form at 0.15% to 1% of the model a task, with and without them."""
    config.name = f"{config.name}_weights"
    config.methods = "retex"
    config.expert_seeds = (0, 1, 2)
    config.offsets.rank = 1
    config.offsets.extra_ranks = ()
    by_leaves = {**BUDGETED, "leaf_weights": "fisher"}
    by_predictions = {**by_leaves, "task_weights": "divergence"}
    config.extra_variants = (
        *budgeted(0.0015, 0.0025, 0.005, 0.01),
        *(("retex", {"budget": size, **by_leaves}) for size in (0.0015, 0.0025, 0.005, 0.01)),
        ("retex", {"budget": 0.0025, **by_predictions}),
    )
    return config


VISION = (
    *("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"),
    *("cifar100", "stl10", "oxford_flowers102", "oxford-iiit-pet", "pcam", "fer2013"),
    *("emnist_letters", "cifar10", "food101", "fashion-mnist", "rendered-sst2", "kmnist"),
    *("vegetables", "kvasir-v2", "intel-images", "weather", "cats-dogs", "mangoleaf", "beans"),
    *("landscape", "garbage", "fruits-360"),
)
"""The papers' data sets in their order; the suites of 8, 14, 20 and 30 are its beginnings."""

_CHECKPOINTS = {"fashion-mnist": "fashion_mnist"}


def own(config: ConfigDict, experts: str) -> ConfigDict:
    """A suite on public experts, or on those that configs/finetune_*.py write to ROOT/own.

    Args:
      config: of the suite, which names public experts.
      experts: "" for them, "own" for those that were fine-tuned here.
    """
    if experts not in ("", "own"):
        raise ValueError(f"experts: got {experts!r}, expected '' or 'own'")
    if experts:
        config.name = f"{config.name}_own"
        base = config.experts.pretrained.rpartition("/")[2]
        config.experts.repositories = tuple(f"own/{base}_{task}" for task in config.tasks)
    return config


def vision_suite(name: str, backbone: str, num_tasks: int, experts: str = "") -> ConfigDict:
    """CLIP and the first data sets of the papers, on their whole test splits.

    The first twenty have public checkpoints (of FusionBench). The last ten have none that we know of: their experts
    are to be fine-tuned by configs/finetune_clip.py.

    Args:
      name: of the experiment.
      backbone: "base-patch32", "base-patch16" or "large-patch14".
      num_tasks: 8, 14, 20 or 30.
      experts: as for `own`.
    """
    config = get_config()
    config.name = name
    config.model.name = "huggingface"
    config.tasks = VISION[:num_tasks]
    config.data.max_test = None
    config.data_sets.root = "datasets"
    config.experts.root = "checkpoints"
    config.experts.pretrained = f"openai/clip-vit-{backbone}"
    config.experts.repositories = tuple(
        f"{'tanganke' if task in VISION[:20] else 'own'}/clip-vit-{backbone}_{_CHECKPOINTS.get(task, task)}"
        for task in config.tasks
    )
    config.offsets.rank = 256
    return own(config, experts)


def fine_tuning(name: str, pretrained: str, task: str) -> ConfigDict:
    """One expert of a snapshot, on the whole of its task.

    Args:
      name: of the experiment.
      pretrained: repository or folder.
      task: which is fine-tuned where no other is given.
    """
    config = get_config()
    config.name = name
    config.task = task
    config.model.name = "huggingface"
    config.model.options = {"dtype": "bfloat16"}
    config.data.max_train = None
    config.data.max_val = 5000
    config.data.max_test = None
    config.data_sets.root = "datasets"
    config.experts.root = "checkpoints"
    config.experts.pretrained = pretrained
    config.finetune = {
        "steps": 2000,  # 0: as many as `epochs` take
        "epochs": 0.0,
        "batch_size": 128,
        "accumulate": 1,  # parts of a batch, taken one after the other
        "bucket": 1,  # batches whose texts are drawn together, and divided by length
        "learning_rate": 1e-5,
        "learning_rates": {},  # task: its own
        "weight_decay": 0.1,
        "decay_vectors": True,  # whether biases and scales decay as well
        "schedule": "cosine",  # or "linear"
        "warmup": 200.0,  # steps, or below 1 a fraction of them
        "keep_best": False,  # of the parameters after each epoch, by the validation part
        "checkpoint_every": 200,
    }
    return config


def get_config() -> ConfigDict:
    """Every entry that an experiment has, with its default."""
    return ConfigDict(
        {
            "name": "",  # also of the workdir
            "seed": 0,
            "model": {
                "name": "dinov2_small",  # see retex_jax.pretrained.NAMES; or "huggingface"
                "options": {},  # fields of the model's configuration that differ from the preset
                "max_length": 64,  # tokens a text; text models only
            },
            "tasks": (),
            # The most examples in each split.
            "data": {"seed": 0, "max_train": 2000, "max_val": 256, "max_test": 512},
            # Of the papers' data sets: ROOT/NAME/SPLIT/CLASS/IMAGE, parquet files of the hub in ROOT/NAME, or what
            # tensorflow-datasets prepared in ROOT; of GLUE, MMLU, TruthfulQA and BBQ see retex_jax.data.glue and
            # retex_jax.data.questions. "": datasets in the cache folder. --dry_run names what is missing.
            "data_sets": {
                "root": "",
                # Processes that decode the papers' images; 0: threads; -1: as many as cores, for 2000 images or more.
                "workers": -1,
            },
            # Of GLUE, MMLU, TruthfulQA and BBQ.
            "language": {
                "metrics": {},  # task: metric that is not its own, see retex_jax.metrics.METRICS
                "shots": 5,  # solved questions before each question of MMLU
                "max_answer": 64,  # tokens of an answer; with its prompt it has model.max_length
            },
            # Fine-tuned here; or, where model.name is "huggingface", snapshots: ROOT/OWNER/NAME, the
            # hub's cache, or the hub.
            "experts": {
                "root": "",  # where experts lie; "": in the cache folder, made when missing
                "pretrained": "",  # repository or folder
                "repositories": (),  # one a task: classifiers, CLIP vision towers or LoRA adapters
                "templates": (),  # prompts of CLIP's zero-shot heads; (): the data sets' own
                "revisions": {},  # repository: commit, to have the same files on every day
            },
            "finetune": {
                "steps": 100,
                "batch_size": 32,
                "learning_rate": 5e-5,
                "head_learning_rate": 1e-3,
                "weight_decay": 0.05,
                "warmup_steps": 10,
                "checkpoint_every": 100,
            },
            # Of retex_jax.compare: "all", or names of retex_jax.METHODS joined by commas.
            "methods": "all",
            "method_options": {},  # name: options that differ; they are not searched
            # Further rows: (name, options), or (name, options, what is searched: option to values).
            "extra_variants": (),
            "num_seeds": 3,  # of methods that are random
            "expert_seeds": (),  # instead of `seed`: the comparison on experts of each, and their means
            # A further row with the options that are best on the first validation inputs of each task.
            "search": {"enabled": True, "num_inputs": 256},
            # Mergers to compare with, and their options; see retex_jax.mergers.MERGERS.
            "baselines": {
                "weight_average": {},
                "task_arithmetic": {"scaling": 0.3},
                "ties": {"density": 0.2, "merge": "mean", "scaling": 1.0},
            },
            "offsets": {
                "rank": 64,
                "extra_ranks": (),  # reported beside `rank`, by the exact solver, task known
                "rank_rule": "paper",  # or "clip"
                "orientation": "right",  # of the shared factor; or "left", "auto"
                # Instead of `rank`, by the exact solver: a fraction of the model a task, or bytes; 0: `rank`.
                "budget": 0.0,
                "sharing": "shared",  # with a budget; or "separate", "auto"
                "task_weights": "equal",  # by the exact solver; or "energy", "divergence"
                "leaf_weights": "equal",  # with a budget; or "fisher"
                "solver": "exact",  # or "adam"
                "base": "weight_average",
                "base_options": {},
                "exact": {"precision": "float64", "bits": 32, "vector_bits": 32},
                "adam": {
                    "learning_rate": 2e-4,
                    "steps": 5000,
                    "warmup_steps": 600,
                    "tasks_per_step": "all",  # or "one"
                },
            },
            "identifier": {
                "kind": "subspace",  # see retex_jax.identifier.IDENTIFIERS
                "rank": 8,  # of "subspace", as "center"
                "layer": 0,  # block whose mean token is the feature; 0: the pooled output
                "layers": (),  # several of them instead of `layer`
                "center": True,
                "normalize": False,
                "options": {},  # further keywords of the identifier's fit
                "num_calibration": 200,  # unlabelled training inputs a task
                # Instead of `layer`, `layers`, "rank", "center", "normalize": what is best on validation inputs,
                # of layers up to a fraction of a forward pass (T with experts); `options` are kept.
                "search": False,
                "max_forward": 1.0,
            },
            # Of retex_jax.identify.
            "identify": {
                "kinds": "all",  # or names of retex_jax.identifier.IDENTIFIERS joined by commas
                "experts": True,  # whether those that run every expert are among them
                "max_forward": 0.6,  # of the identifier that is recommended: blocks run / blocks
                "calibration_sizes": (),  # such as (32, 64, 128, 256, 1024), of the best of each kind
                # Tasks to hold out together as unknown, several times; (): each task in turn.
                "unseen": (),
                "target": 0.95,  # of validation inputs, taken as of a known task
            },
            # Of methods that need data; see retex_jax.calibration.
            "calibration": {"num_inputs": 256, "batch_size": 16},
            # routed_inputs: how many test inputs a task, where every input has a merged model of its own.
            "evaluate": {"batch_size": 64, "routed_inputs": 64},
            # Of retex_jax.unseen: some tasks' experts are left out, and what the others give on these is evaluated.
            "unseen": {
                "num_unseen": 2,  # tasks left out in a split
                "num_splits": 4,
                "splits": (),  # instead of both: the tasks left out, a tuple of names a split
                "num_train": 256,  # labelled training inputs a task that make the heads of unseen tasks
                "num_test": 256,  # test inputs a task, the most
                # Of soft weights, in units of the scores' spread; the best on validation inputs of seen tasks.
                "temperatures": (0.1, 0.3, 1.0),
            },
            # Beside metrics.jsonl; each needs the extra of its name.
            "writers": {"tensorboard": False, "wandb": False},
        }
    )
