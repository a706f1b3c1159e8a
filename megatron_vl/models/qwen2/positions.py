"""Positions of text: one axis, from 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_vl.models.spec import VLMSpec


def positions(spec: VLMSpec, video_positions: str = "published"):
    """Of a sample's tokens int64 [S]: int64 [1, S]. There are no videos to have a rule for."""
    return _counted


def _counted(tokens: torch.Tensor, grids: Sequence = ()) -> torch.Tensor:
    return torch.arange(len(tokens))[None]
