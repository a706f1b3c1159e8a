"""`fusion.quick_gelu` as one Triton kernel forward and one backward; sums in fp32, rounded once.

The bias is added by both: what they read is what the product before them wrote.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # numbers a program


@triton.jit
def _value(x, bias, at, here, width, biased: tl.constexpr):
    value = tl.load(x + at, mask=here).to(tl.float32)
    if biased:
        value += tl.load(bias + at % width, mask=here).to(tl.float32)
    return value


@triton.jit
def _forward(x, bias, out, count, width, biased: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = at < count
    value = _value(x, bias, at, here, width, biased)
    result = value * tl.sigmoid(1.702 * value)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=here)


@triton.jit
def _backward(x, bias, gradient, out, count, width, biased: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = at < count
    value = _value(x, bias, at, here, width, biased)
    sigmoid = tl.sigmoid(1.702 * value)
    slope = sigmoid * (1.0 + 1.702 * value * (1.0 - sigmoid))
    result = tl.load(gradient + at, mask=here).to(tl.float32) * slope
    tl.store(out + at, result.to(out.dtype.element_ty), mask=here)


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        out = torch.empty_like(x)
        if x.numel():
            biased = bias is not None
            _forward[(triton.cdiv(x.numel(), _BLOCK),)](
                x, bias if biased else x, out, x.numel(), x.shape[-1], biased, _BLOCK
            )
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, bias = ctx.saved_tensors
        biased = bias is not None
        gradient, out = gradient.contiguous(), torch.empty_like(x)
        if x.numel():
            _backward[(triton.cdiv(x.numel(), _BLOCK),)](
                x, bias if biased else x, gradient, out, x.numel(), x.shape[-1], biased, _BLOCK
            )
        of_bias = out.view(-1, x.shape[-1]).sum(0) if biased and ctx.needs_input_grad[1] else None
        return out, of_bias


def quick_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `megatron_vl.ops.fusion.quick_gelu`."""
    return _QuickGelu.apply(x, bias)
