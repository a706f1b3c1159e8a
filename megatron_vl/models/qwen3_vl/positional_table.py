"""A table of learned positions over a square, interpolated to the patches of an image.

Letters: S positions a side of the table, h rows and w columns of patches, D width.
"""

from __future__ import annotations

from functools import lru_cache

import torch


def interpolated(
    table_SSD: torch.Tensor, h: int, w: int, merge: int
) -> torch.Tensor:
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
