"""Rotary position embedding: cosines and sines once a microbatch, one product a layer.

Letters: s positions, b rows, X heads, H head dim, R = H / 2 angles. The halves of a head turn
together: number r with number r + R (Su et al., arXiv 2104.09864, in GPT-NeoX's order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rotary:
    """Cosine and sine of every angle, [s, b, 1, R] in the dtype of queries and keys."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, angles_sb1R: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """From fp32 angles: a 16-bit angle would be off by whole turns."""
        return cls(angles_sb1R.cos().to(dtype), angles_sb1R.sin().to(dtype))


def rotate(x_sbXH: torch.Tensor, cos_sb1R: torch.Tensor, sin_sb1R: torch.Tensor) -> torch.Tensor:
    """Queries or keys turned by their positions' angles; [s, b, X, H] as they came."""
    first, second = x_sbXH.chunk(2, dim=-1)
    return torch.cat(
        (first * cos_sb1R - second * sin_sb1R, second * cos_sb1R + first * sin_sb1R), dim=-1
    )


def section_angles(
    positions_3bs: torch.Tensor, *, base: float, head_dim: int, sections: Sequence[int],
    interleaved: bool = False,
) -> torch.Tensor:
    """Angles fp32 [s, b, 1, R] of positions in several axes: angle r is position * base^(-2r/H).

    Each axis turns its own section of a head: the first `sections[0]` angles the first axis, and so
    on (Qwen2-VL, arXiv 2409.12191, section 2.1). Interleaved, the axes take turns angle by angle
    until a section is used up, and the first axis has what is left (Qwen3-VL, arXiv 2511.21631,
    section 2.1).

    Args:
        positions_3bs: int64 [axes, b, s].
        sections: angles of each axis; they sum to R.
    """
    device = positions_3bs.device
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    inverse_R = 1.0 / base**exponents
    if interleaved:
        axes = len(sections)
        angles_bsR = positions_3bs[0].float()[..., None] * inverse_R
        for axis in range(1, axes):
            its = slice(axis, axes * sections[axis], axes)
            angles_bsR[..., its] = positions_3bs[axis].float()[..., None] * inverse_R[its]
    else:
        angles_bsR = torch.cat([
            positions_3bs[axis].float()[..., None] * inverse
            for axis, inverse in enumerate(inverse_R.split(list(sections)))
        ], dim=-1)
    return angles_bsR.transpose(0, 1).unsqueeze(2)
