"""Variable-length attention by the flash kernels that torch itself brings."""

from __future__ import annotations

import inspect

import torch
from torch.nn.attention.varlen import varlen_attn

from megatron_vl.ops.segments import Segments

# The kernels take fewer key/value heads by themselves; from 2.12 on torch wants to be told so.
TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def attention(
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """See `megatron_vl.ops.attention.VarlenAttention`."""
    return varlen_attn(
        q_TNH,
        k_TGH,
        v_TGH,
        segments.cu_seqlens,
        segments.cu_seqlens,
        segments.max_length,
        segments.max_length,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        **({"enable_gqa": q_TNH.shape[1] != k_TGH.shape[1]} if TAKES_GQA else {}),
    )
