"""Qwen-VL's positions: those of text, in which an image's places count like words."""

from megatron_vl.models.common.text_positions import positions

__all__ = ["positions"]
