"""Qwen3-VL's media: see `megatron_vl.models.common.deepstack`."""

from megatron_vl.models.common.deepstack.media import processor

__all__ = ["processor"]
