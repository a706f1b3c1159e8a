"""transformers' Qwen3-VL with experts, the judge."""

from megatron_vl.models.common.media_reference import auto_class, generator_inputs, inputs

__all__ = ["auto_class", "generator_inputs", "inputs"]
