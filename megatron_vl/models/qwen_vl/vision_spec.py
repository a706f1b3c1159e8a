"""Sizes of Qwen-VL's tower: a ViT over a square of patches, and a resampler with learned queries.

P patches of an image, Q queries, W tower width, E language width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class ResampledVisionSpec:
    """A `megatron_vl.models.tower_spec.TowerSpec`: every image becomes P patches and then Q tokens.

    Raises:
        InputError: sizes that do not fit one another.
    """

    depth: int  # layers
    hidden_size: int  # W
    num_heads: int
    ffn_hidden_size: int
    in_channels: int
    image_size: int  # pixels a side
    patch_size: int  # pixels a side
    num_positions: int  # rows of the stored table of positions, a square
    num_queries: int  # Q, a square
    resampler_heads: int
    out_hidden_size: int  # E
    norm_eps: float
    activation: str = "gelu"
    normalization: str = "LayerNorm"
    gated: bool = False

    def __post_init__(self) -> None:
        for what, size, parts in (
            ("width", self.hidden_size, self.num_heads),
            ("output_dim", self.out_hidden_size, self.resampler_heads),
        ):
            if parts < 1 or size % parts:
                raise InputError(
                    f"config.json's visual {what} {size} is not a multiple of its {parts} heads."
                )
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise InputError(
                f"config.json's visual n_queries is {self.num_queries}; it must be a square."
            )
        if not self.side:
            raise InputError(
                f"config.json's visual image_size {self.image_size} holds no patch of "
                f"{self.patch_size} pixels."
            )

    @property
    def side(self) -> int:
        """Patches a side of an image."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.in_channels * self.patch_size**2

    @property
    def divided(self) -> dict[str, int]:
        """See `TowerSpec`."""
        return {"vision attention heads": self.num_heads, "vision ffn width": self.ffn_hidden_size,
                "resampler heads": self.resampler_heads}

    @property
    def only_grid(self) -> tuple[int, int, int]:
        """See `TowerSpec`."""
        return 1, self.side, self.side

    @property
    def smallest_grid(self) -> tuple[int, int, int]:
        """See `TowerSpec`."""
        return self.only_grid

    def num_tokens(self, grid: Sequence[int]) -> int:
        """Tokens that the decoder sees of an image: Q, between the two that enclose it."""
        return self.num_queries

    @property
    def num_features(self) -> int:
        """See `TowerSpec`."""
        return 0

    def states(self, grids: Sequence[Sequence[int]], layer: int) -> tuple[int, int]:
        """See `TowerSpec`."""
        return sum(map(math.prod, grids)), self.hidden_size

    def forward_flops(self, grid: tuple[int, int, int]) -> int:
        """FLOPs of a forward pass over one image.

        Two for each multiply-add of the matrix products: a patch embedding, in every layer q, k, v
        and the projection (4 W^2), the MLP (2 W F), scores and sums (2 P W), and the resampler.
        """
        width, patches = self.hidden_size, math.prod(grid)
        layer = 4 * width**2 + 2 * width * self.ffn_hidden_size
        matrices = 2 * patches * (self.patch_dim * width + self.depth * layer)
        return matrices + self.attention_flops(grid) + self.merger_flops(grid)

    def attention_flops(self, grid: tuple[int, int, int]) -> int:
        """Of them, scores and sums of the layers."""
        return 2 * math.prod(grid) ** 2 * 2 * self.hidden_size * self.depth

    def merger_flops(self, grid: tuple[int, int, int]) -> int:
        """Of them, the resampler's: keys and values of patches (W E + 2 E^2), queries and two
        projections of tokens (3 E^2), scores and sums (2 Q E a patch)."""
        wide, patches, queries = self.out_hidden_size, math.prod(grid), self.num_queries
        of_patch = self.hidden_size * wide + 2 * wide**2 + 2 * queries * wide
        return 2 * (patches * of_patch + queries * 3 * wide**2)
