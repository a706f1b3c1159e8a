"""Variable-length attention on torch's scaled_dot_product_attention: the reference backend.

Segments of like length are stacked into rectangles, so many short segments cost a few batched
calls. Causal rows may be padded on the right, where no real query looks; bidirectional rows never.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_vl.ops.segments import Segments


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
    heads = q_TNH.shape[1]
    repeat = heads // k_TGH.shape[1]
    buckets = segments.padded_buckets if causal else segments.equal_buckets
    outputs = []
    for bucket in buckets:
        rows, width = bucket.shape

        def rectangle(x_TXH, rows=rows, width=width, bucket=bucket):
            if bucket.contiguous is not None:
                x = x_TXH[slice(*bucket.contiguous)]
            else:
                x = x_TXH.index_select(0, bucket.gather)
            return x.reshape(rows, width, *x_TXH.shape[1:]).transpose(1, 2)

        k, v = rectangle(k_TGH), rectangle(v_TGH)
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        out = scaled_dot_product_attention(
            rectangle(q_TNH), k, v, is_causal=causal, scale=scale
        )
        out = out.transpose(1, 2).reshape(rows * width, heads, -1)
        outputs.append(out if bucket.kept is None else out.index_select(0, bucket.kept))
    if buckets.restore is None:
        return outputs[0]
    return torch.cat(outputs).index_select(0, buckets.restore)
