"""Megatron-Core's way to drop a tensor in forward and make it again in backward, anywhere."""

from __future__ import annotations

import torch


def install_recompute() -> None:
    """Without TransformerEngine and without a C++ compiler. Idempotent.

    Megatron-Core 0.16.1 to 0.19 takes an `fp8` of False, the default, for fp8. From 0.19 on it
    compiles a few lines of C++ in every rank, to save a copy of what was made again.
    """
    from megatron.core.tensor_parallel import random

    if hasattr(random, "_get_share_storage"):
        random._get_share_storage = lambda: copy_storage
    kind = random.CheckpointWithoutOutput
    if not kind().fp8:
        return
    initialize = kind.__init__

    def without_fp8(self, fp8=False):
        initialize(self, fp8=fp8 or None)

    kind.__init__ = without_fp8


def copy_storage(dropped: torch.Tensor, made: torch.Tensor) -> None:
    """Give a tensor whose storage was emptied the numbers of one like it, as Megatron-Core before
    0.19 does; no version is counted, for autograd looks at it."""
    with torch.no_grad():
        dropped.untyped_storage().resize_(made.untyped_storage().size())
        dropped.untyped_storage().copy_(made.untyped_storage())
