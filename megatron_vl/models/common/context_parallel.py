"""Context parallelism: ranks that share one row, each with an equal run of its tokens.

Inside attention the ranks trade tokens for heads: each then holds the whole row for its share of
the heads, and any variable-length backend runs on it as it is. Against gathering keys and values,
this moves less (all of q, k, v and the output once, divided by the ranks), needs no mask of its own
for rows of many segments, and is balanced under a causal mask without cutting rows in zigzag. Its
price: the ranks cannot be more than the heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Letters: s row length, c ranks, t = s / c tokens of a rank, b rows, X heads, H head dim.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel


class RowShare:
    """This rank's part of a row. Without context parallelism it is the whole."""

    def __init__(self) -> None:
        self.size = parallel_state.get_context_parallel_world_size()
        self.rank = parallel_state.get_context_parallel_rank()
        self.group = parallel_state.get_context_parallel_group()

    def columns(self, row_length: int) -> slice:
        """The tokens of a row of `row_length` that are this rank's."""
        part = row_length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def trained(self, x_bs: torch.Tensor, loss_mask_bs: torch.Tensor) -> torch.Tensor:
        """Of values [b, s] those of this rank's trained tokens, in the order of their losses [n].

        Args:
            loss_mask_bs: above 0 where a token is trained.
        """
        columns = self.columns(x_bs.shape[1])
        return x_bs[:, columns].T[loss_mask_bs[:, columns].T > 0]

    def tokens_to_heads(self, x_tbXH: torch.Tensor) -> torch.Tensor:
        """[t, b, X, H] -> [s, b, X/c, H]; with fewer heads than ranks each is on several."""
        if self.size == 1:
            return x_tbXH
        heads = x_tbXH.shape[2]
        if heads % self.size:
            x_tbXH = x_tbXH.repeat_interleave(self.size // heads, dim=2)
        t, b, heads, width = x_tbXH.shape
        parts = x_tbXH.reshape(t, b, self.size, heads // self.size, width)
        parts = parts.permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous()  # [c*t, b, X/c, H]
        return tensor_parallel.all_to_all(self.group, parts)

    def heads_to_tokens(self, x_sbXH: torch.Tensor) -> torch.Tensor:
        """[s, b, X/c, H] -> [t, b, X, H], the way back."""
        if self.size == 1:
            return x_sbXH
        s, b, heads, width = x_sbXH.shape
        parts = tensor_parallel.all_to_all(self.group, x_sbXH.contiguous())
        parts = parts.reshape(self.size, s // self.size, b, heads, width)
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)
