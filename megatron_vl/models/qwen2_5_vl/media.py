"""Qwen2.5-VL's media: Qwen2-VL's."""

from megatron_vl.models.common.patch_media import processor

__all__ = ["processor"]
