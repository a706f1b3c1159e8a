"""Variable-length attention by torch_npu's npu_fusion_attention, for Ascend NPUs.

Its documentation is in Ascend/op-plugin, docs/zh/custom_APIs/torch_npu. It differs from
flash-attn's in this: the ends of the segments are numbers of the host, without the 0 at which the
first begins; a mask is True where nothing is attended to; without one, attention is bidirectional
whatever else is given.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import torch
import torch_npu

from megatron_vl.ops.segments import Segments

MOST_SEGMENTS = 1024  # of a call; vision frames and windows are more
COMPRESSED = 2048  # rows of the mask that stands for a causal one of any size
UNMASKED, CAUSAL = 0, 3  # of `sparse_mode`; in the latter the last tokens of q and k are aligned


@cache
def _later_tokens(device: torch.device) -> torch.Tensor:
    """The mask of causal attention, bool [COMPRESSED, COMPRESSED]."""
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu(1)


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
    lengths = segments.lengths
    calls = [list(accumulate(lengths[at : at + MOST_SEGMENTS]))
             for at in range(0, len(lengths), MOST_SEGMENTS)]
    parts = (x.split([ends[-1] for ends in calls]) for x in (q_TNH, k_TGH, v_TGH))
    outputs = [
        torch_npu.npu_fusion_attention(
            q, k, v,
            head_num=q.shape[1],
            input_layout="TND",
            atten_mask=_later_tokens(q.device) if causal else None,
            scale=scale,
            actual_seq_qlen=ends,
            actual_seq_kvlen=ends,
            sparse_mode=CAUSAL if causal else UNMASKED,
        )[0]
        for ends, q, k, v in zip(calls, *parts, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
