"""torch_npu's fused operators: shadow/torch_npu_kernels.py, of what the device's tensors hold."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
from shadow import torch_npu_kernels
from shadow.device import Shadow


def on_device(kernel: Callable) -> Callable:
    """The operator; its first output can be differentiated, as the vendor's can."""
    signature = inspect.signature(kernel)

    @functools.wraps(kernel)
    def operator(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        out = _Operator.apply(kernel, given.kwargs, *given.args)
        return out if len(out) > 1 else out[0]

    return operator


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, options, *given):
        inputs = list(given)
        for at, one in enumerate(given):
            if isinstance(one, torch.Tensor):
                if not isinstance(one, Shadow):
                    raise RuntimeError(f"{kernel.__name__} got a tensor of the CPU")
                inputs[at] = one.held.detach().requires_grad_(ctx.needs_input_grad[2 + at])
        with torch.enable_grad():
            found = kernel(*inputs, **options)
        found = found if isinstance(found, tuple) else (found,)
        ctx.inputs, ctx.found = inputs, found[0]
        out = [Shadow(one.detach()) if isinstance(one, torch.Tensor) else one for one in found]
        ctx.mark_non_differentiable(*(one for one in out[1:] if isinstance(one, Shadow)))
        return tuple(out)

    @staticmethod
    def backward(ctx, gradient, *_):
        wanted = [at for at, one in enumerate(ctx.inputs)
                  if isinstance(one, torch.Tensor) and one.requires_grad]
        gradients = [None] * len(ctx.inputs)
        found = torch.autograd.grad(ctx.found, [ctx.inputs[at] for at in wanted], gradient.held)
        for at, one in zip(wanted, found, strict=True):
            gradients[at] = Shadow(one)
        return None, None, *gradients


npu_fusion_attention = on_device(torch_npu_kernels.npu_fusion_attention)
npu_rms_norm = on_device(torch_npu_kernels.npu_rms_norm)
npu_rotary_mul = on_device(torch_npu_kernels.npu_rotary_mul)
npu_swiglu = on_device(torch_npu_kernels.npu_swiglu)
npu_gelu = on_device(torch_npu_kernels.npu_gelu)
npu_fast_gelu = on_device(torch_npu_kernels.npu_fast_gelu)
