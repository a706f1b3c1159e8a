"""Media of a Qwen3-VL with experts: Qwen3-VL's."""

from megatron_vl.models.common.deepstack.media import processor

__all__ = ["processor"]
