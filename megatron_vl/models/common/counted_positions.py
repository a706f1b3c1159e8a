"""Positions on one axis: tokens are counted from 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch


class CountedPositions:
    """See `megatron_vl.models.family.Positions`."""

    axes: ClassVar[int] = 1

    def __call__(
        self, tokens: torch.Tensor, grids: Sequence = (), seconds: Sequence[float] = ()
    ) -> torch.Tensor:
        return torch.arange(len(tokens))[None]
