"""Elementwise operations as one kernel each, where the platform makes kernels at run time.

Each is written once, in plain torch. On the CPU that runs as it is; on a CUDA device torch.compile
makes of it one kernel forward and one backward, which read and write every number once; the turning
of queries and keys, which lie in strides, has a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

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


@cache
def choose_activation(function: Callable, fused: bool) -> Callable:
    """`function` of ACTIVATIONS, or the kernel that equals it; compiled once a process."""
    if not fused:
        return function
    # Numbers in a line, as many as there are: rows and images differ in every microbatch, and a
    # kernel for each shape would never be done compiling.
    compiled = torch.compile(function, dynamic=True)
    return lambda x: compiled(x.flatten()).view_as(x)
