"""The vision tower of a Qwen3-VL with experts: Qwen3-VL's."""

from megatron_vl.models.common.deepstack.tower import build_tower

__all__ = ["build_tower"]
