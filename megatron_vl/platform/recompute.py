"""Megatron-Core's way to drop a tensor in forward and make it again in backward, without TE."""

from __future__ import annotations


def install_recompute() -> None:
    """Idempotent. Megatron-Core 0.16.1 to 0.19 takes an `fp8` of False, the default, for fp8."""
    from megatron.core.tensor_parallel import random

    kind = random.CheckpointWithoutOutput
    if not kind().fp8:
        return
    initialize = kind.__init__

    def without_fp8(self, fp8=False):
        initialize(self, fp8=fp8 or None)

    kind.__init__ = without_fp8
