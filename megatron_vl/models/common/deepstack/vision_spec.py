"""Sizes of Qwen3-VL's tower: one that merges patches, and hands features to language layers too.

No torch, no Megatron-Core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.errors import InputError
from megatron_vl.models.tower_spec import VisionSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepstackVisionSpec(VisionSpec):
    """A `megatron_vl.models.tower_spec.TowerSpec` with learned positions and deepstack features.

    Raises:
        InputError: sizes that do not fit one another.
    """

    num_positions: int  # rows of the stored table of positions, a square
    feature_layers: tuple[int, ...]  # from 0: what comes out of them is merged to a feature each

    def __post_init__(self) -> None:
        super(DeepstackVisionSpec, self).__post_init__()  # slots make another class of this one
        if math.isqrt(self.num_positions) ** 2 != self.num_positions:
            raise InputError(
                f"config.json's num_position_embeddings is {self.num_positions}; it must be a "
                f"square."
            )
        layers = list(self.feature_layers)
        if not layers or layers != sorted(set(layers)) or layers[-1] >= self.depth:
            raise InputError(
                f"config.json's deepstack_visual_indexes is {layers}; it must name layers of the "
                f"tower, from 0 to {self.depth - 1}, in ascending order."
            )

    @property
    def num_features(self) -> int:
        """See `TowerSpec`."""
        return len(self.feature_layers)

    def kept(self, layer: int) -> int:
        """How many of the layers before `layer` are merged to features."""
        return sum(one < layer for one in self.feature_layers)

    def states(self, grids: Sequence[Sequence[int]], layer: int) -> tuple[int, int]:
        """See `TowerSpec`."""
        return sum(map(math.prod, grids)), self.hidden_size * (1 + self.kept(layer))

    def merger_flops(self, grid: tuple[int, int, int]) -> int:
        """Of them, the mergers': that of the embeddings, and one of each feature."""
        of_one = super(DeepstackVisionSpec, self).merger_flops(grid)
        return of_one * (1 + self.num_features)
