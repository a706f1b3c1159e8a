"""Qwen2-VL's positions: frames of patches follow one another as rows and columns do."""

from __future__ import annotations

from megatron_vl.models.common.media_positions import (
    MediaPositions,
    VideoPositions,
    media_positions,
)
from megatron_vl.models.spec import ModelSpec


def positions(spec: ModelSpec, video_positions: VideoPositions = "published") -> MediaPositions:
    """See `megatron_vl.models.family.Family`."""
    return media_positions(spec, video_positions)
