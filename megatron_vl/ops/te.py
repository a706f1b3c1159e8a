"""Variable-length attention by TransformerEngine: cuDNN's fused kernels, or flash-attn's."""

from __future__ import annotations

import os

import torch
from transformer_engine.pytorch.attention.dot_product_attention import (
    DotProductAttention,
    _attention_backends,
)
from transformer_engine.pytorch.attention.dot_product_attention.utils import FlashAttentionUtils

from megatron_vl.ops.segments import Segments

# TransformerEngine chooses among its kernels by these, and fails where the one left cannot run.
SWITCHES = ("NVTE_FUSED_ATTN", "NVTE_FLASH_ATTN", "NVTE_UNFUSED_ATTN")
KERNELS = {"fused": ("1", "0", "0"), "flash": ("0", "1", "0")}


class TEAttention:
    """TransformerEngine's DotProductAttention with one of KERNELS, as a `VarlenAttention`.

    It is no torch module: it holds no weight, and TransformerEngine's state of it belongs in no
    checkpoint.

    Raises:
        ImportError: TransformerEngine takes none of the flash-attn that is installed.
    """

    def __init__(self, kernel: str, deterministic: bool):
        takes_flash = FlashAttentionUtils.is_installed or FlashAttentionUtils.v3_is_installed
        if kernel == "flash" and not takes_flash:
            raise ImportError("TransformerEngine does not take this version of flash-attn")
        self.kernel, self.deterministic = kernel, deterministic
        self.modules: dict[tuple, DotProductAttention] = {}  # of a layer one, after its first rows

    def __call__(
        self,
        q_TNH: torch.Tensor,
        k_TGH: torch.Tensor,
        v_TGH: torch.Tensor,
        segments: Segments,
        *,
        causal: bool,
        scale: float,
    ) -> torch.Tensor:
        """See `megatron_vl.ops.attention.VarlenAttention`."""
        self._switch_kernel()
        out = self._module(*q_TNH.shape[1:], k_TGH.shape[1], causal, scale)(
            q_TNH,
            k_TGH,
            v_TGH,
            cu_seqlens_q=segments.cu_seqlens,
            cu_seqlens_kv=segments.cu_seqlens,
            max_seqlen_q=segments.max_length,
            max_seqlen_kv=segments.max_length,
        )
        return out.reshape(q_TNH.shape)

    def _switch_kernel(self) -> None:
        """TransformerEngine repeats its last choice for like inputs, unless told to choose anew."""
        if tuple(map(os.environ.get, SWITCHES)) != KERNELS[self.kernel]:
            os.environ.update(zip(SWITCHES, KERNELS[self.kernel], strict=True))
            _attention_backends["backend_selection_requires_update"] = True

    def _module(
        self, heads: int, head_dim: int, groups: int, causal: bool, scale: float
    ) -> DotProductAttention:
        key = (heads, head_dim, groups, causal, scale)
        if key not in self.modules:
            if self.deterministic:
                os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # read while it is built
            self.modules[key] = DotProductAttention(
                heads,  # of this rank, so it is told of no tensor-parallel group
                head_dim,
                num_gqa_groups=groups,
                qkv_format="thd",
                # Says that lengths differ, not that there is padding; "thd" takes no other mask.
                attn_mask_type="padding_causal" if causal else "padding",
                softmax_scale=scale,
            )
        return self.modules[key]
