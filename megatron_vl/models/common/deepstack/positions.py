"""Qwen3-VL's positions: every frame of a video counts as an image does, behind its timestamp."""

from __future__ import annotations

from megatron_vl.models.common.media_positions import (
    MediaPositions,
    VideoPositions,
    media_positions,
)
from megatron_vl.models.spec import ModelSpec


def positions(spec: ModelSpec, video_positions: VideoPositions = "published") -> MediaPositions:
    """See `megatron_vl.models.family.Family`; of one frame both countings are the same."""
    return media_positions(spec, video_positions)
