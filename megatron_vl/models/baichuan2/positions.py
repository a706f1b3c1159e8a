"""Positions of text."""

from megatron_vl.models.qwen2.positions import positions

__all__ = ["positions"]
