"""transformers' Qwen2, the judge."""

from megatron_vl.models.common.text_reference import auto_class

__all__ = ["auto_class"]
