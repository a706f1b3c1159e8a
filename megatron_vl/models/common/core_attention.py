"""Megatron-Core's core attention over packed rows, on whichever backend fits the machine.

Letters: s row length, b rows, N query heads, G key/value heads, H head dim.
Rows arrive as [s, b, ...] and leave so; inside, rows are laid end to end (row-major), the order in
which `Segments` counts. Queries and keys are turned here, by angles from explicit positions: those
of Megatron-Core would be computed anew in every layer, cut in zigzag under context parallelism and,
with `qkv_format` "thd", restarted in every segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megatron_vl.models.common.context_parallel import RowShare
from megatron_vl.models.common.routed_tokens import RoutedTokens
from megatron_vl.ops.attention import choose_backend
from megatron_vl.ops.fusion import choose_kernel
from megatron_vl.ops.rotary import Rotary
from megatron_vl.ops.segments import Segments


@dataclass
class SegmentParams(PackedSeqParams):
    """Carries what every layer needs of the packed rows through Megatron-Core's."""

    segments: Segments | None = None
    windows: Segments | None = None  # of the layers that attend within windows, where there are any
    rotary: Rotary | None = None  # of this rank's positions; None: they were added to the input
    routed: RoutedTokens | None = None  # in training, where there are experts


class VarlenCoreAttention(MegatronModule):
    """Drop-in for Megatron-Core's DotProductAttention that never attends across segments."""

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        windowed: bool = False,
    ):
        super().__init__(config=config)
        self.windowed = windowed
        self.causal = attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        # The vision tower's ranks have images of their own instead.
        self.share = RowShare() if config.context_parallel_size > 1 else None
        self.attention = choose_backend(
            config.varlen_attention_backend,
            dtype=config.params_dtype,
            head_dim=config.kv_channels,
            deterministic=config.deterministic_mode,
        ).attention
        self.rotate = choose_kernel("rotary", config.fused_ops).function
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError("attention dropout is not part of variable-length attention; set 0.")

    def forward(
        self,
        query: torch.Tensor,  # [s, b, N, H]
        key: torch.Tensor,  # [s, b, G, H]
        value: torch.Tensor,  # [s, b, G, H]
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: SegmentParams | None = None,
    ) -> torch.Tensor:
        """Attention inside the segments; returns [s, b, N*H]."""
        assert attention_mask is None and attention_bias is None
        rotary = packed_seq_params.rotary
        if rotary is not None:
            query = self.rotate(query, rotary.cos, rotary.sin)
            key = self.rotate(key, rotary.cos, rotary.sin)
        if self.share is not None:
            query, key, value = map(self.share.tokens_to_heads, (query, key, value))
        s, b, heads, head_dim = query.shape
        segments = packed_seq_params.windows if self.windowed else packed_seq_params.segments
        assert segments.num_tokens == b * s, (segments.num_tokens, query.shape)

        def rows_end_to_end(x):
            return x.transpose(0, 1).reshape(b * s, *x.shape[2:])

        out = self.attention(
            rows_end_to_end(query), rows_end_to_end(key), rows_end_to_end(value), segments,
            causal=self.causal, scale=self.scale,
        )
        out = out.reshape(b, s, heads, head_dim).transpose(0, 1)
        if self.share is not None:
            out = self.share.heads_to_tokens(out)
        return out.flatten(2).contiguous()
