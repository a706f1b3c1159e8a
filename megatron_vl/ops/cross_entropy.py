"""Losses of logits whose vocabulary is cut over tensor-parallel ranks.

Letters: c positions, V vocabulary (per tp rank).
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def cross_entropy(logits_cV: torch.Tensor, label_c: torch.Tensor, padding: int) -> torch.Tensor:
    """float32 [c]. May overwrite the logits.

    Args:
        padding: rows at the whole vocabulary's end that are no words.
    """
    return vocab_parallel_cross_entropy(without_padding(logits_cV, padding), label_c)


def without_padding(logits_cV: torch.Tensor, padding: int) -> torch.Tensor:
    """The logits in float32, of which none can be predicted that is no word."""
    logits_cV = logits_cV.float()
    if count := padding_here(logits_cV.shape[1], padding):
        # Softmax makes their gradient zero, so no graph need know.
        logits_cV.detach()[:, -count:] = float("-inf")
    return logits_cV


def padding_here(width: int, padding: int) -> int:
    """How many of this rank's last columns of logits, of `width`, are no words."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    ranks_behind = size - 1 - parallel_state.get_tensor_model_parallel_rank()
    return min(width, max(0, padding - ranks_behind * width))
