"""Elementwise operations as one kernel each, on a device that gains by it.

Each is written once in plain torch, which runs everywhere and is the reference. What reads and
writes most has a Triton kernel that equals it. torch.compile could make the same kernels, but its
wrappers cost the host a tenth of a millisecond a call, more than the kernels take.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from megatron_vl.ops.rotary import rotate


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), as CLIP's."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "silu": F.silu}


def choose_rotate(fused: bool) -> Callable:
    """`rotary.rotate`, or the kernel that equals it."""
    if not fused:
        return rotate
    from megatron_vl.ops.rotary_triton import rotate as fused_rotate

    return fused_rotate


def choose_activation(function: Callable, fused: bool) -> Callable:
    """`function` of ACTIVATIONS, or the kernel that equals it; torch has one for the others."""
    if not fused or function is not quick_gelu:
        return function
    from megatron_vl.ops.activation_triton import quick_gelu as fused_quick_gelu

    return fused_quick_gelu
