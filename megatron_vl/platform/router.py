"""Megatron-Core's router of experts without TransformerEngine."""

from __future__ import annotations


def install_router() -> None:
    """Let it find that TransformerEngine's matrix product is missing. Idempotent.

    Megatron-Core 0.16.1 asks whether it is None, but does not set it so.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
