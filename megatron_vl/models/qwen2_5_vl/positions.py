"""Qwen2.5-VL's positions: time is counted in seconds (arXiv 2502.13923, section 2.1.3)."""

from __future__ import annotations

from megatron_vl.models.common.media_positions import (
    MediaPositions,
    VideoPositions,
    media_positions,
)
from megatron_vl.models.spec import ModelSpec


def positions(spec: ModelSpec, video_positions: VideoPositions = "published") -> MediaPositions:
    """See `megatron_vl.models.family.Family`."""
    return media_positions(spec, video_positions, spec.vision.tokens_per_second)
