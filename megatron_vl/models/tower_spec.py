"""Sizes of a vision tower: what is asked of any, and those of towers that merge patches.

No torch, no Megatron-Core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_vl.errors import InputError
from megatron_vl.models.sizes import check_positive

FFN_MULTIPLE = 16  # of a tower's stored MLP; no published tower has more heads for TP to divide


class TowerSpec(Protocol):
    """Sizes of a vision tower and of what projects it to the decoder's width, whatever they are.

    A dataclass, so that two models can be compared. A grid is the frames, rows and columns of
    patches of one image or video.
    """

    @property
    def depth(self) -> int:
        """Layers."""

    @property
    def hidden_size(self) -> int:
        """Width of a layer."""

    @property
    def num_heads(self) -> int:
        """Heads of a layer."""

    @property
    def head_dim(self) -> int:
        """Width of one of them."""

    @property
    def norm_eps(self) -> float:
        """Of the layers' norms."""

    @property
    def activation(self) -> str:
        """Of the layers' MLP."""

    @property
    def gated(self) -> bool:
        """Whether that has a gate."""

    @property
    def out_hidden_size(self) -> int:
        """Width of the embeddings: the decoder's."""

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""

    @property
    def divided(self) -> dict[str, int]:
        """The sizes that tensor parallelism divides, by name."""

    @property
    def smallest_grid(self) -> tuple[int, int, int]:
        """Of the smallest image."""

    @property
    def only_grid(self) -> tuple[int, int, int] | None:
        """Of every image, where all are brought to one size; None: an image keeps its own."""

    @property
    def num_features(self) -> int:
        """Embeddings that every token has beside its own, for the first language layers to add, one
        each (deepstack); 0: there are none."""

    def num_tokens(self, grid: Sequence[int]) -> int:
        """Tokens that the decoder sees of an image or video."""

    def states(self, grids: Sequence[Sequence[int]], layer: int) -> tuple[int, int]:
        """Shape of what enters layer `layer`, from 0, of these grids: patches, and numbers of each.

        That is the width, and what earlier layers keep of a patch for the features.
        """

    def forward_flops(self, grid: tuple[int, int, int]) -> int:
        """FLOPs of a forward pass over one image or video."""

    def attention_flops(self, grid: tuple[int, int, int]) -> int:
        """Of them, scores and sums of the layers."""

    def merger_flops(self, grid: tuple[int, int, int]) -> int:
        """Of them, those of what projects it to the decoder's width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSpec:
    """The vision tower of Qwen2-VL and of those after it, with the merger behind it.

    Raises:
        InputError: sizes that do not fit one another.
    """

    depth: int  # layers
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    in_channels: int
    patch_size: int  # pixels a side
    temporal_patch_size: int  # frames a patch
    spatial_merge_size: int  # patches a side that the merger joins to one token
    norm_eps: float
    out_hidden_size: int  # the decoder's hidden size
    activation: str  # of the blocks' MLP: "quick_gelu", "gelu", "silu"
    gated: bool = False  # the MLP has a gate
    normalization: str = "LayerNorm"  # or "RMSNorm"
    window_cells: int | None = None  # merged patches a side of a window; None: there are none
    full_attention_layers: tuple[int, ...] = ()  # of a tower with windows, those without
    tokens_per_second: float | None = None  # positions a second of video takes; None: one a frame

    def __post_init__(self) -> None:
        check_positive(self, "depth", "hidden_size", "num_heads", "ffn_hidden_size", "in_channels",
                  "patch_size", "temporal_patch_size", "spatial_merge_size", "out_hidden_size")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"config.json's vision width {self.hidden_size} is not a multiple of its "
                f"{self.num_heads} heads."
            )
        if self.head_dim % 4:
            raise InputError(
                f"config.json's vision heads are {self.head_dim} wide; positions of rows and "
                f"columns need a multiple of 4."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def stored_ffn_size(self) -> int:
        """Width of the MLP in the model that trains: a gated one is filled up with zeros, so that
        TP can divide it (Qwen2.5-VL's 3420 is 4 x 855)."""
        return -(-self.ffn_hidden_size // FFN_MULTIPLE) * FFN_MULTIPLE if self.gated else (
            self.ffn_hidden_size
        )

    @property
    def merged_size(self) -> int:
        """Width of the patches that become one token, side by side."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch, as the image processor hands it over."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    # ---- what pipeline and fusion ask, whatever the tower is ----------------------------------

    @property
    def num_features(self) -> int:
        """See `TowerSpec`."""
        return 0

    @property
    def divided(self) -> dict[str, int]:
        """See `TowerSpec`."""
        return {"vision attention heads": self.num_heads, "vision ffn width": self.stored_ffn_size,
                "merger width": self.merged_size}

    @property
    def smallest_grid(self) -> tuple[int, int, int]:
        """Of an image of one token."""
        return 1, self.spatial_merge_size, self.spatial_merge_size

    @property
    def only_grid(self) -> None:
        """See `TowerSpec`."""
        return None

    def num_tokens(self, grid: Sequence[int]) -> int:
        """Tokens that the decoder sees of an image or video of t x h x w patches."""
        return math.prod(grid) // self.spatial_merge_size**2

    def states(self, grids: Sequence[Sequence[int]], layer: int) -> tuple[int, int]:
        """See `TowerSpec`."""
        return sum(map(math.prod, grids)), self.hidden_size

    def forward_flops(self, grid: tuple[int, int, int]) -> int:
        """FLOPs of a forward pass over one image or video of t x h x w patches.

        Two for each multiply-add of the matrix products: a patch embedding, in every layer q, k, v
        and the projection (4 D^2), the MLP (2 D F, with a gate 3 D F) and, within a frame of
        L = h w patches or within windows, scores
        and sums (2 L D), and the merger; as Megatron-LM counts (arXiv 2104.04473, appendix), with D
        the width and F the MLP's.
        """
        width, patches = self.hidden_size, math.prod(grid)
        layer = 4 * width**2 + (3 if self.gated else 2) * width * self.ffn_hidden_size
        matrices = 2 * patches * (self.patch_dim * width + self.depth * layer)
        return matrices + self.attention_flops(grid) + self.merger_flops(grid)

    def attention_flops(self, grid: tuple[int, int, int]) -> int:
        """Of them, scores and sums."""
        t, h, w = grid
        pairs = self.depth * t * (h * w) ** 2
        if self.window_cells is not None:
            full = len(self.full_attention_layers)
            side = self.window_cells * self.spatial_merge_size  # patches

            def squares(size: int) -> int:
                """Of the windows' extents along one side, the sum."""
                return size // side * side**2 + (size % side) ** 2

            pairs = t * (full * (h * w) ** 2 + (self.depth - full) * squares(h) * squares(w))
        return 2 * pairs * 2 * self.hidden_size

    def merger_flops(self, grid: tuple[int, int, int]) -> int:
        """Of them, the merger's."""
        merged = self.merged_size
        merger = (merged**2 + merged * self.out_hidden_size) // self.spatial_merge_size**2
        return 2 * math.prod(grid) * merger
