"""LoRA (arXiv:2106.09685): PEFT's adapters read as experts, and offsets written as adapters."""

from retex_jax.lora.adapter import Adapter, adapter_from_offset, save_adapter
from retex_jax.lora.source import LoraSource

__all__ = ["Adapter", "LoraSource", "adapter_from_offset", "save_adapter"]
