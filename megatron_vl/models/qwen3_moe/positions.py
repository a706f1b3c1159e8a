"""Positions of text: one axis, from 0."""

from megatron_vl.models.common.text_positions import positions

__all__ = ["positions"]
