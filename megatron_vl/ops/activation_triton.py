"""`fusion.quick_gelu` as one Triton kernel forward and one backward; sums in fp32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # numbers a program


@triton.jit
def _forward(x, out, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = at < count
    value = tl.load(x + at, mask=here).to(tl.float32)
    result = value * tl.sigmoid(1.702 * value)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=here)


@triton.jit
def _backward(x, gradient, out, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = at < count
    value = tl.load(x + at, mask=here).to(tl.float32)
    sigmoid = tl.sigmoid(1.702 * value)
    slope = sigmoid * (1.0 + 1.702 * value * (1.0 - sigmoid))
    result = tl.load(gradient + at, mask=here).to(tl.float32) * slope
    tl.store(out + at, result.to(out.dtype.element_ty), mask=here)


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        if x.numel():
            _forward[(triton.cdiv(x.numel(), _BLOCK),)](x, out, x.numel(), _BLOCK)
        return out

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        gradient, out = gradient.contiguous(), torch.empty_like(x)
        if x.numel():
            _backward[(triton.cdiv(x.numel(), _BLOCK),)](x, gradient, out, x.numel(), _BLOCK)
        return out


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """See `megatron_vl.ops.fusion.quick_gelu`."""
    return _QuickGelu.apply(x)
