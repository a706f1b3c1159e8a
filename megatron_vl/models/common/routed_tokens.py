"""Which of a rank's tokens are samples' and which padding, as routers of experts ask.

Letters: b rows, s row length, t tokens of this rank, n segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state

from megatron_vl.models.common.context_parallel import RowShare
from megatron_vl.ops.segments import Segments


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedTokens:
    """A microbatch, of which this rank routes t tokens in the order of its hidden states.

    Attributes:
        sample_t: int64 [t], the segment of each; padding's is n.
        size_n: float32 [n], tokens of every sample over all ranks; 0 of a segment of padding.
        samples: how many there are.
        num_tokens: of them together.
        own: of them on this rank.
        weight: what the microbatch counts in the mean over all: the divisor of its loss.
        counted: layers that have counted it; one that runs again for backward finds itself here.
    """

    sample_t: torch.Tensor
    size_n: torch.Tensor
    samples: int
    num_tokens: int
    own: int
    weight: float
    counted: set[int] = field(default_factory=set)

    @property
    def is_real_t(self) -> torch.Tensor:
        """bool [t]: no padding."""
        return self.sample_t < len(self.size_n)

    @classmethod
    def of(
        cls, segments: Segments, row_tokens: Sequence[int], *, share: RowShare,
        sequence_parallel: bool, weight: float,
    ) -> RoutedTokens:
        """This rank's.

        Args:
            segments: of the b*s tokens, row after row.
            row_tokens: of each row's samples; what is behind them is padding.
            share: this rank's part of a row.
            sequence_parallel: whether tensor-parallel ranks divide that again.
        """
        rows, n = len(row_tokens), len(segments.lengths)
        lengths = torch.tensor(segments.lengths)
        sample_bs = torch.repeat_interleave(torch.arange(n), lengths).view(rows, -1)
        columns = torch.arange(sample_bs.shape[1])
        sample_bs[columns >= torch.tensor(row_tokens)[:, None]] = n
        size_n = torch.bincount(sample_bs.flatten(), minlength=n + 1)[:n]
        own = sample_bs[:, share.columns(sample_bs.shape[1])].T
        if sequence_parallel:
            own = own.chunk(parallel_state.get_tensor_model_parallel_world_size())[
                parallel_state.get_tensor_model_parallel_rank()]
        return cls(
            sample_t=own.flatten().to(segments.device, non_blocking=True),
            size_n=size_n.float().to(segments.device, non_blocking=True),
            samples=int((size_n > 0).sum()), num_tokens=sum(row_tokens), own=int((own < n).sum()),
            weight=weight,
        )
