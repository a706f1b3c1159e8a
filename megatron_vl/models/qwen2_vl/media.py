"""Qwen2-VL's media."""

from megatron_vl.models.common.patch_media import processor

__all__ = ["processor"]
