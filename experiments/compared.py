"""Which rows of the comparisons stand in README.md and experiments/docs/; read by experiments/readme.py."""

SUITES = ("minilm_text8", "dinov2_vision8")

Entry = str | tuple[str | None, str | None]
"""An entry of results.json; one a suite where they differ, None where a suite has none."""

# What is said of a method, and its entry.
ONE_MODEL: dict[str, Entry] = {
    "Weight Averaging": "weight_average",
    "Task Arithmetic, 0.3": "task_arithmetic scaling=0.3",
    "Task Arithmetic, searched": "task_arithmetic scaling (validation)",
    "TIES, 20%, 1.0": "ties density=0.2, merge=mean, scaling=1.0",
    "TIES, 20%, searched": "ties density=0.2, merge=mean, scaling (validation)",
    "DARE, 0.5, + TIES": "dare drop=0.5, merge=ties",
    "Consensus, 0.4, 0.3": "consensus mask_lambda=0.4",
    "Consensus, 0.4, searched": "consensus mask_lambda=0.4, scaling (validation)",
    "Fisher, batch sum": "fisher num_samples=None, variant=batch_sum",
    "RegMean": "regmean",
    "AdaMerging, a task": (
        "adamerging granularity=task, batches_per_step=1, learning_rate=0.01, steps=20"
    ),
    "AdaMerging, a layer": (
        "adamerging granularity=layer, batches_per_step=1, learning_rate=0.01, steps=20"
    ),
    "AdaMerging++, a layer": (
        "adamerging granularity=layer, plus_plus=True, batches_per_step=1, learning_rate=0.01, steps=20"
    ),
}
_BUDGET = "bits=3, vector_bits=4, sharing=auto, orientation=auto, task_weights=energy"
KEPT_APART: dict[str, Entry] = {
    "ReTeX, rank 2": ("retex rank=2", None),
    "ReTeX, rank 4": (None, "retex rank=4"),
    "ReTeX, rank 8": ("retex rank=8", None),
    "ReTeX, rank 16": "retex rank=16",
    "ReTeX, rank 64": "retex rank=64",
    "ReTeX by budget, a quarter of a percent": f"retex budget=0.0025, {_BUDGET}",
    "ReTeX by budget, half a percent": f"retex budget=0.005, {_BUDGET}",
    "ReTeX by budget, one percent": f"retex budget=0.01, {_BUDGET}",
    "DTS-T, at most one percent": "dts_t amr=0.01",
    "DTS-T": "dts_t",
    "DTS-D": "dts_d",
    "DTS-D, from Weight Averaging": "dts_d base=weight_average",
    "SVD": "svd",
    "T-Switch": "t_switch",
    "T-Switch, from Weight Averaging": "t_switch from=weight_average",
    "EMR": "emr",
    "EMR, from Weight Averaging": "emr from=weight_average",
    "TALL-mask": "tall_mask",
}
ROUTED: dict[str, Entry] = {
    "Twin-Merging (routed)": "twin",
    "SMEAR, frozen experts (routed)": "smear_frozen",
    "WEMoE (routed)": "wemoe steps=10",
    "DaWin (routed)": "dawin",
}
IN_SHORT = (
    *("Weight Averaging", "Task Arithmetic, 0.3", "TIES, 20%, 1.0", "RegMean"),
    *("AdaMerging++, a layer", "ReTeX, rank 16", "ReTeX, rank 64"),
    *("ReTeX by budget, a quarter of a percent", "ReTeX by budget, one percent"),
    *("DTS-T, at most one percent", "DTS-D", "SVD", "T-Switch", "EMR", "TALL-mask"),
    *("Twin-Merging (routed)", "SMEAR, frozen experts (routed)"),
)

FRONTS = ("minilm_text8_pareto", "dinov2_vision8_pareto")
SIZES = (0.0015, 0.0025, 0.005, 0.01, 0.02, 0.04)

# What is said of a method in several sizes, and its entries.
FAMILIES = {
    "ReTeX by budget": r"retex budget=.*",
    "ReTeX": r"retex rank=\d+",
    "ReTeX, longer side shared": r"retex rank=\d+, orientation=auto",
    "ReTeX-E": r"retex form=factorized, .*",
    "DTS-T": r"dts_t.*",
    "T-Switch": r"t_switch.*",
    "EMR": r"emr.*",
}

WEIGHTS = ("minilm_text8_weights", "dinov2_vision8_weights")

# What is said of the weights of offsets by budget, and their entries.
WEIGHTED = {
    "tasks by energy": rf"retex budget=[\d.]+, {_BUDGET}",
    "leaves by Fisher information as well": rf"retex budget=[\d.]+, {_BUDGET}, leaf_weights=fisher",
    "and tasks by divergence": r"retex budget=.*, task_weights=divergence, leaf_weights=fisher",
}
