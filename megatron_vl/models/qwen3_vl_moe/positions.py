"""Positions of a Qwen3-VL with experts: Qwen3-VL's."""

from megatron_vl.models.common.deepstack.positions import positions

__all__ = ["positions"]
