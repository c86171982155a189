"""ReTeX, table 5: how many numbers the parts of a generated offset have, by kind of leaf.

    python experiments/retex_table_5.py --suite=minilm_text8

Of the suite's model, rank and number of tasks, with as many entries in an embedding as tasks; a kind is a leaf in all
layers. "generator" is the linear layer with its bias, "baked" what takes its place where no new embedding is to come:
the tasks' own factors; "offsets" are those of all tasks. The last row is in models: what is stored beside the merged
one, but for the embeddings. No expert is read.
"""

import jax
import paper_programs
import papers

from retex_jax import command_line, experiment, models, offsets, tree
from retex_jax.offsets import generator
from retex_jax.offsets.state import plan_leaves

PARTS = ("generator", "baked", "shared", "offsets")


def rows(config: papers.ConfigDict) -> dict[str, dict[str, float]]:
    """A row a kind of leaf, and one for all."""
    model = experiment.build_model(command_line.as_dict(config), offline=True)
    leaves = tree.flatten(models.expected_params(model))
    spec, tasks = config.offsets, len(config.tasks)
    plans = plan_leaves(leaves, "flax", spec.rank, spec.rank_rule, spec.orientation)
    found: dict[str, dict[str, float]] = {}
    for name, leaf in leaves.items():
        plan = plans.get(name)
        shape = plan.solved_shape if plan else leaf.shape
        parts = _parts(shape, plan.rank if plan else None, tasks)
        row = found.setdefault(offsets.kind_of(name), dict.fromkeys(["leaves", *PARTS], 0.0))
        row["leaves"] += 1
        for part, size in parts.items():
            row[part] += size
    size = sum(row["offsets"] for row in found.values()) / tasks
    total = {part: sum(row[part] for row in found.values()) / size for part in PARTS}
    return {**found, "all, in models": total}


def _parts(shape: tuple[int, ...], rank: int | None, tasks: int) -> dict[str, float]:
    """Numbers of one leaf's parts."""
    target = jax.ShapeDtypeStruct((1, tasks, *shape), "float32")
    params = jax.eval_shape(
        lambda key: generator.init_params(key, [["leaf"]], {0: target}, {0: rank}, tasks),
        jax.random.key(0),
    )
    group = params["groups"][0]
    factor = jax.eval_shape(lambda p: generator.task_factors(p, 0, p["embeddings"]), params)
    return {
        "generator": group["weight"].size + group["bias"].size,
        "baked": factor.size,
        "shared": group["shared"].size,
        "offsets": target.size,
    }


if __name__ == "__main__":
    paper_programs.stated(__file__, rows, "numbers; in the last row models")
