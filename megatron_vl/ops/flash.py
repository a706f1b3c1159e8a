"""Variable-length attention by flash-attn 2 (Dao, arXiv 2307.08691)."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func

from megatron_vl.ops.segments import Segments


def attention(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float,
    deterministic: bool = False,
) -> torch.Tensor:
    """See `megatron_vl.ops.attention.VarlenAttention`."""
    return flash_attn_varlen_func(
        q_TNH,
        k_TGH,
        v_TGH,
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_k=segments.cu_seqlens,
        max_seqlen_q=segments.max_length,
        max_seqlen_k=segments.max_length,
        softmax_scale=scale,
        causal=causal,
        deterministic=deterministic,
    )
