"""A table of learned positions over a square, interpolated to the patches of an image.

Letters: S positions a side of the table, h rows and w columns of patches, P patches of all images,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch


class PositionalTable(torch.nn.Embedding):
    """An Embedding so that the weight [S * S, D] has the published name and shape."""

    def forward(self, grids: Sequence[tuple[int, int, int]], merge: int) -> torch.Tensor:
        """Of every patch, float32 [P, D], in merge-block order; alike in all frames of a grid."""
        side = round(self.num_embeddings**0.5)
        table_SSD = self.weight.unflatten(0, (side, side))
        of_size = {size: interpolated(table_SSD, *size, merge)
                   for size in dict.fromkeys((h, w) for _, h, w in grids)}
        return torch.cat([of_size[h, w].repeat(t, 1) for t, h, w in grids])


def interpolated(table_SSD: torch.Tensor, h: int, w: int, merge: int) -> torch.Tensor:
    """Of every patch of a frame, float32 [h * w, D], in merge-block order.

    Bilinear, with the corners of the table on those of the image. As two matrix products, one a
    direction: their gradient is the same at every run, which that of gathered rows is not on CUDA.
    """
    rows_hS, columns_wS = (hats(n, table_SSD.shape[0], table_SSD.device) for n in (h, w))
    made_SwD = columns_wS @ table_SSD.float()
    made_hwD = (rows_hS @ made_SwD.flatten(1)).unflatten(1, (w, -1))
    blocks = made_hwD.view(h // merge, merge, w // merge, merge, -1)
    return blocks.transpose(1, 2).reshape(h * w, -1)


@lru_cache(maxsize=256)
def hats(size: int, side: int, device: torch.device) -> torch.Tensor:
    """float32 [size, side]: what each of `size` places takes of the `side` stored ones."""
    places = torch.arange(size, device=device, dtype=torch.float32) * (side - 1) / max(size - 1, 1)
    return (1 - (places[:, None] - torch.arange(side, device=device)).abs()).clamp(min=0)
