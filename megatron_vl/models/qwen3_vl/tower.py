"""Qwen3-VL's vision tower: see `megatron_vl.models.common.deepstack`."""

from megatron_vl.models.common.deepstack.tower import build_tower

__all__ = ["build_tower"]
