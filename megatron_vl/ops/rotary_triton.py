"""`rotary.rotate` as one Triton kernel, which reads queries or keys once, as they lie.

Letters: see `megatron_vl.ops.rotary`; t tokens, s * b of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _turn(
    x, out, cos, sin, rows, stride_s, stride_b, stride_x, sign,
    heads: tl.constexpr, angles: tl.constexpr, block_x: tl.constexpr, block_r: tl.constexpr,
):
    """One program a token. `sign` -1 turns back, which is the gradient."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, block_x)[:, None]
    angle = tl.arange(0, block_r)[None, :]
    here = (head < heads) & (angle < angles)
    c = tl.load(cos + token * angles + angle, mask=angle < angles).to(tl.float32)
    s = tl.load(sin + token * angles + angle, mask=angle < angles).to(tl.float32) * sign
    source = x + (token // rows) * stride_s + (token % rows) * stride_b + head * stride_x + angle
    first = tl.load(source, mask=here).to(tl.float32)
    second = tl.load(source + angles, mask=here).to(tl.float32)
    target = out + (token * heads + head) * 2 * angles + angle
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=here)
    tl.store(target + angles, (second * c + first * s).to(out.dtype.element_ty), mask=here)


def _turned(x_sbXH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float):
    if x_sbXH.stride(-1) != 1:
        x_sbXH = x_sbXH.contiguous()
    s, b, heads, width = x_sbXH.shape
    out = torch.empty((s, b, heads, width), dtype=x_sbXH.dtype, device=x_sbXH.device)
    if s * b:
        _turn[(s * b,)](
            x_sbXH, out, cos, sin, b, *x_sbXH.stride()[:3], sign, heads, width // 2,
            triton.next_power_of_2(heads), triton.next_power_of_2(width // 2),
        )
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_sbXH, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x_sbXH, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, gradient):
        return _turned(gradient, *ctx.saved_tensors, -1.0), None, None


def rotate(x_sbXH: torch.Tensor, cos_sb1R: torch.Tensor, sin_sb1R: torch.Tensor) -> torch.Tensor:
    """See `megatron_vl.ops.rotary.rotate`; sums are made in fp32 and rounded once."""
    return _Rotate.apply(x_sbXH, cos_sb1R.contiguous(), sin_sb1R.contiguous())
