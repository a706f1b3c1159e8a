"""Variable-length attention by flash-attn 2 (Dao, arXiv 2307.08691) and 4."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_vl.ops.segments import Segments


def attention(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float,
    kernel: Callable,
    deterministic: bool = False,
) -> torch.Tensor:
    """See `megatron_vl.ops.attention.VarlenAttention`. `kernel`: the library's function."""
    out = kernel(
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
    return out[0] if isinstance(out, tuple) else out  # that of 4 gives the softmax's sums too
