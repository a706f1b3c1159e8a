"""Tables of absolute positions over a square: drawn, resized bicubically, made of sines.

Letters: P positions of a table, a square, D width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch.nn import functional as F


def resized(table_PD: torch.Tensor, side: int) -> torch.Tensor:
    """The table for `side` x `side` positions, [side^2, D], computed in fp32.

    `F.interpolate` is linear in what it resizes: as a matrix product its gradient is the same at
    every run, which on CUDA that of the kernel is not.
    """
    stored = math.isqrt(len(table_PD))
    if stored == side:
        return table_PD
    matrix = _bicubic(stored, side, table_PD.device)
    return (matrix @ table_PD.float()).to(table_PD.dtype)


@lru_cache(maxsize=8)
def _bicubic(stored: int, side: int, device: torch.device) -> torch.Tensor:
    """float32 [side^2, stored^2]: what each of the new positions takes of the stored ones."""
    unit_vectors = torch.eye(stored**2).view(1, stored**2, stored, stored)
    made = F.interpolate(unit_vectors, size=(side, side), mode="bicubic", align_corners=False)
    return made.flatten(2)[0].T.contiguous().to(device)


def drawn(shape: tuple[int, ...], std: float, dtype: torch.dtype) -> torch.nn.Parameter:
    """A normal weight, drawn in fp32 and then cast: CUDA draws no truncated normal in bf16."""
    weight = torch.nn.init.trunc_normal_(torch.empty(shape), std=std, a=-3 * std, b=3 * std)
    return torch.nn.Parameter(weight.to(dtype))


def sine_table(side: int, width: int) -> torch.Tensor:
    """float32 [side^2, width]: sines and cosines of the column, then of the row.

    As "Masked Autoencoders" has them (arXiv 2111.06377), in whose code columns come first.
    """
    exponents = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    angles = torch.arange(side)[:, None] / 10000.0**exponents
    half = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    columns, rows = half.repeat(side, 1), half.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1).float()
