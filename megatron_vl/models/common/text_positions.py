"""Positions of text: one axis, from 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch


class _Counted:
    """The family's `megatron_vl.models.family.Positions`."""

    axes: ClassVar[int] = 1

    def __call__(
        self, tokens: torch.Tensor, grids: Sequence = (), seconds: Sequence[float] = ()
    ) -> torch.Tensor:
        return torch.arange(len(tokens))[None]


def positions(spec, video_positions: str = "published") -> _Counted:
    """There are no videos to have a rule for."""
    return _Counted()
