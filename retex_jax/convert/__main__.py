"""Checks checkpoints before anything is downloaded, loaded or merged.

    python -m retex_jax.convert --check PRETRAINED EXPERT ... --exclude '^classifier'

Each is a safetensors file, a snapshot folder, a PEFT adapter folder, or OWNER/NAME on the Hugging Face hub. Only
headers are read: of a repository that is neither below --root nor in the cache, by range from the hub. With a
config.json leaves are compared as the model's, without its head; without one by their names in the file, as
ExpertSet.from_safetensors compares them. The exit status is 1 where something does not fit.
"""

import argparse
import sys

from retex_jax import expert_checks, logging
from retex_jax.convert import inspection


def main(arguments: list[str] | None = None) -> int:
    """Inspects the pretrained model and its experts, and prints what they are and what does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m retex_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--check",
        nargs="+",
        metavar="PATH",
        required=True,
        help="the pretrained model, its experts",
    )
    parser.add_argument("--root", default="", help="folder with a snapshot folder a repository")
    parser.add_argument("--revision", help="commit, tag or branch of repositories on the hub")
    parser.add_argument("--offline", action="store_true", help="do not use the network")
    parser.add_argument(
        "--exclude",
        nargs="+",
        metavar="PATTERN",
        default=(),
        help="regular expressions of leaves that are left out, by names a/b/c, as ExpertSet takes them",
    )
    options = parser.parse_args(arguments)
    try:
        expert_checks.check_patterns(options.exclude)
    except ValueError as error:
        parser.error(str(error))
    first, *others = options.check
    adapters = [path for path in others if inspection.is_adapter(path)]
    inspections = [
        inspection.inspect(
            path,
            root=options.root,
            revision=options.revision,
            offline=options.offline,
            exclude=options.exclude,
        )
        for path in (first, *(path for path in others if path not in adapters))
    ]
    logging.table(
        "checkpoints",
        ["where", "architecture", "tensors", "dtypes", "MiB", "tied"],
        inspection.summarise(inspections),
    )
    pretrained, experts = inspections[0], inspections[1:]
    problems = {item.where: list(item.problems) for item in inspections}
    for item in inspections:
        if item.architecture is None and not item.problems:
            print(f"{item.where}: no config.json, so it is compared by the names in its file")
    for expert in experts:
        if pretrained.problems or expert.problems:
            continue
        problems[expert.where] += (found := inspection.disagreements(pretrained, expert))
        if not found and (raw := inspection.raw_disagreements(pretrained, expert)):
            print(
                f'{expert.where}: fits in an experiment (model.name = "huggingface"), but '
                f"ExpertSet.from_safetensors reads raw names and finds {len(raw)} "
                f"missing, extra or different, such as: {raw[0]}"
            )
    for path in adapters:
        problems[path] = inspection.inspect_adapter(path, first)
        print(f"{path}: a LoRA adapter, read as an expert of {first}")
    merged = next(
        filter(None, (item.leaves or item.raw_leaves for item in (*experts, pretrained))), {}
    )
    if others and merged:
        memory = inspection.merge_bytes(merged, len(others))
        print(f"merging {len(others)} experts leaf by leaf takes about {memory / 2**20:.1f} MiB")
    for where, lines in problems.items():
        for line in lines:
            print(f"{where}: {line}")
    wrong = sum(map(len, problems.values()))
    print(f"{wrong} problem(s)" if wrong else "everything fits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
