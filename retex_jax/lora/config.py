"""What an adapter_config.json of PEFT says about the numbers, and what in it can't be read here."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from retex_jax.snapshot import parse_json

CONFIG_FILE = "adapter_config.json"

# Fields that change what the adapter computes, so that it is no longer W + scaling * B A.
_UNSUPPORTED = {
    "alora_invocation_tokens": "the adapter acts on some tokens only",
    "arrow_config": "adapters are mixed by input",
    "kasa_config": "the base's weights are truncated",
    "layer_replication": "layers of the base are repeated",
    "lora_bias": "lora_B has a bias",
    "megatron_config": "layers of Megatron are not supported",
    "monteclora_config": "the factors are sampled",
    "target_parameters": "parameters that are no module's weight are adapted",
    "trainable_token_indices": "single rows of an embedding are replaced",
    "use_bdlora": "the factors are block-diagonal",
    "use_dora": "DoRA rescales the sum by a learned magnitude",
    "use_qalora": "inputs are pooled",
}
# The other ways to start (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the base's weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class LoraConfig(NamedTuple):
    """The fields that reading needs; PEFT's names and defaults."""

    base_model: str | None
    r: int
    lora_alpha: float
    use_rslora: bool
    fan_in_fan_out: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]

    def rank(self, module: str) -> int:
        """Rank of a module, named as the adapter's keys name it ("h.0.attn.c_attn")."""
        return _first_match(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) if rank-stabilised (arXiv:2312.03732)."""
        rank = self.rank(module)
        alpha = _first_match(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, module: str) -> bool:
        """Whether a module lies in one of `modules_to_save`, which match by the end of a name."""
        parts = module.split(".")
        parents = [".".join(parts[: end + 1]) for end in range(len(parts))]
        return any(parent.endswith(name) for parent in parents for name in self.modules_to_save)


def read_config(folder: Path) -> tuple[LoraConfig, list[str]]:
    """Reads a folder's adapter_config.json.

    Returns:
      The configuration, with defaults in place of what is wrong, and all that is wrong.

    Raises:
      ValueError: if there is no such file, or it is no JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        fields = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable adapter configuration: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: got a {type(fields).__name__}, expected a JSON object")
    problems = []
    if fields.get("peft_type") != "LORA":
        problems.append(f"peft_type is {fields.get('peft_type')!r}, expected 'LORA'")
    for name, why in _UNSUPPORTED.items():
        if fields.get(name):
            problems.append(f"{name} is set: {why}")
    start = fields.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        problems.append(
            f"init_lora_weights is {start!r}, which changes the base's weights too; save the adapter "
            "again with PEFT's path_initial_model_for_weight_conversion"
        )
    if fields.get("bias", "none") not in ("none", "all", "lora_only"):
        problems.append(f"bias is {fields['bias']!r}, expected 'none', 'all' or 'lora_only'")

    def take(name: str, default: Any, expected: str, valid: Any) -> Any:
        value = fields.get(name, default)
        if valid(value):
            return value
        problems.append(f"{name} is {value!r}, expected {expected}")
        return default

    ranks = "names or regular expressions to ranks >= 1"
    alphas = "names or regular expressions to finite numbers"
    config = LoraConfig(
        base_model=take(
            "base_model_name_or_path", None, "a name or null", lambda x: isinstance(x, str | None)
        ),
        r=take("r", 8, "an integer >= 1", _is_rank),
        lora_alpha=take("lora_alpha", 8, "a finite number", _is_number),
        use_rslora=take("use_rslora", False, "true or false", _is_bool),
        fan_in_fan_out=take("fan_in_fan_out", False, "true or false", _is_bool),
        rank_pattern=take("rank_pattern", {}, ranks, lambda x: _is_pattern(x, _is_rank)) or {},
        alpha_pattern=take("alpha_pattern", {}, alphas, lambda x: _is_pattern(x, _is_number)) or {},
        modules_to_save=tuple(take("modules_to_save", None, "a list of names", _is_names) or ()),
    )
    return config, problems


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(name, str) and name for name in value)
    )


def _is_pattern(value: Any, valid: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(valid(number) for number in value.values())
        and all(_compiles(pattern) for pattern in value)
    )


def _compiles(pattern: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return False
    return True
