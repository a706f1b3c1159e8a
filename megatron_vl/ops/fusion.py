"""Elementwise operations as one kernel each, where the platform makes kernels at run time.

Each is written once, in plain torch. On the CPU that runs as it is; on a CUDA device torch.compile
makes of it one kernel forward and one backward, which read and write every number once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


@cache
def fused(function: Callable, on: bool = True) -> Callable:
    """`function`, compiled if `on`; the same object for the same function, so compiled once.

    Its sizes stay open: rows and images differ in every microbatch, and a kernel for each would
    never be done compiling.
    """
    return torch.compile(function, dynamic=True) if on else function


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), as CLIP's."""
    return x * torch.sigmoid(1.702 * x)
