"""What a model's family gives to those who name none: protocols, without torch or Megatron-Core.

`megatron_vl.models.registry.Family` is every family's; a folder under `megatron_vl/models/` holds
what it calls. S tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from megatron_vl.models.spec import VLMSpec

Grid = tuple[int, int, int]  # frames, rows and columns of patches before any are merged


class Positions(Protocol):
    """Rotary positions of one sample: `positions(tokens, grids)`."""

    @property
    def axes(self) -> int:
        """Position ids a token has: 3 of time, height and width, 1 of a text alone."""

    def __call__(self, tokens: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Position ids int64 [axes, S], from 0.

        Args:
            tokens: int64 [S], each image or video already as many placeholders as it has tokens.
            grids: one an image or video, in the order of their placeholders.

        Raises:
            ValueError: the placeholders do not match the grids.
        """


class Family(Protocol):
    """A family as data sees it."""

    def positions(self, spec: VLMSpec, video_positions: str = "published") -> Positions:
        """The positions of this model's samples.

        Args:
            video_positions: of text after a video; what `MediaLimits.video_positions` says.
        """
