"""What would stop identifiers later; for `retex_jax.preflight`."""

from collections.abc import Mapping
from typing import Any

from retex_jax import experiment, tree
from retex_jax.experiment import Settings
from retex_jax.identifier import IDENTIFIERS


def problems(settings: Settings, model: Any) -> list[str]:
    """Looks at settings["identifier"], of the experiment's own identifier.

    Args:
      settings: the experiment.
      model: Linen module; None where it is not known, nor then what depends on its layers and width.

    Returns:
      One line each.
    """
    spec = settings["identifier"]
    found = [] if model is None else _layer_problems(spec, model.config.num_layers)
    if spec["num_calibration"] < 2:
        found.append(
            f"identifier.num_calibration: got {spec['num_calibration']}, expected 2 or more"
        )
    if spec["kind"] not in IDENTIFIERS:
        hint = tree.did_you_mean(spec["kind"], IDENTIFIERS)
        known = sorted(IDENTIFIERS)
        return [*found, f"identifier.kind: got {spec['kind']!r}, expected one of {known}{hint}"]
    if spec["search"]:
        options = dict(spec["options"])
    else:
        options = experiment.identifier_options(spec)
        if options.get("joint") and len(spec["layers"]) == 0:
            found.append("identifier.options.joint: got True, but identifier.layers has none")
    wrong = IDENTIFIERS[spec["kind"]].problems(options)
    found += [f"identifier.options.{line}" for line in wrong]
    if spec["num_calibration"] < 2:
        return found
    widths = {float("inf")} if model is None else _widths(spec, model.config)
    if len(widths) > 1:
        found.append(
            f"identifier.layers: got {spec['layers']}, whose features are of the widths {sorted(widths)}, expected "
            "0, the pooled output, alone"
        )
    return found + _size_problems(options, spec["num_calibration"], min(widths))


def _widths(spec: Mapping[str, Any], config: Any) -> set[int]:
    """Of the features of the layers that are set; of a block's where layers are searched."""
    if spec["search"]:
        return {config.width}
    layers = spec["layers"] or (spec["layer"],)
    return {config.width if layer else config.feature_dim for layer in layers}


def _layer_problems(spec: Mapping[str, Any], num_layers: int) -> list[str]:
    found = [
        f"identifier.{name}: got {layer}, expected 1 to {num_layers}, or 0 for the pooled output"
        for name, layers in (("layer", (spec["layer"],)), ("layers", spec["layers"]))
        for layer in layers
        if not 0 <= layer <= num_layers
    ]
    return found + _forward_problems("identifier.max_forward", spec["max_forward"], num_layers)


def comparison_problems(settings: Settings, model: Any) -> list[str]:
    """Looks at settings["identify"], which `retex_jax.identify` needs besides; as `problems`."""
    spec, tasks = settings["identify"], list(settings["tasks"])
    found = _forward_problems("identify.max_forward", spec["max_forward"], model.config.num_layers)
    try:
        kinds = experiment.identifier_kinds(spec)
        if not any(not IDENTIFIERS[kind].needs_experts for kind in kinds):
            found.append(f"identify.kinds: got {spec['kinds']!r}, expected one without experts")
    except ValueError as error:
        found.append(str(error))
    sizes = spec["calibration_sizes"]
    if not all(isinstance(size, int) and size > 1 for size in sizes):
        found.append(f"identify.calibration_sizes: got {sizes}, expected integers of 2 or more")
    if not 0 < spec["target"] <= 1:
        found.append(f"identify.target: got {spec['target']}, expected a fraction in (0, 1]")
    if len(tasks) < 2:
        found.append(f"tasks: got {tasks}, expected two or more to identify")
    for split in spec["unseen"]:
        names = [split] if isinstance(split, str) else list(split)
        if not names or not set(names) < set(tasks) or len(set(names)) < len(names):
            found.append(f"identify.unseen: got {names}, expected some of {tasks}, not all")
    return found


def _forward_problems(where: str, value: Any, num_layers: int) -> list[str]:
    if value * num_layers >= 1:
        return []
    return [f"{where}: got {value}, expected 1 / {num_layers} or more, the cost of one block"]


def _size_problems(options: Mapping[str, Any], num_calibration: int, width: float) -> list[str]:
    """What an identifier's options ask of more inputs or of wider features than there are."""
    found = []
    rank, num_inputs = options.get("rank", 1), options.get("num_inputs") or 0
    if not 1 <= rank < num_calibration:
        found.append(
            f"identifier.rank: got {rank}, expected 1 to num_calibration - 1 = {num_calibration - 1}"
        )
    elif rank >= width:
        found.append(f"identifier.rank: got {rank}, expected less than the features' {width}")
    if num_inputs > num_calibration:
        found.append(
            f"identifier.options.num_inputs: got {num_inputs}, expected at most num_calibration = "
            f"{num_calibration}"
        )
    if options.get("score") == "distance" and options.get("k", 10) > num_calibration:
        found.append(
            f"identifier.options.k: got {options.get('k', 10)}, expected at most num_calibration = "
            f"{num_calibration}"
        )
    return found
