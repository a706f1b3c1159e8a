"""Positions of text."""

from megatron_vl.models.common.text_positions import positions

__all__ = ["positions"]
