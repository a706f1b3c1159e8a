"""Qwen3-VL's positions: see `megatron_vl.models.common.deepstack`."""

from megatron_vl.models.common.deepstack.positions import positions

__all__ = ["positions"]
