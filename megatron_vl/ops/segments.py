"""Where the segments of packed rows start and end.

Letters: T packed tokens, n segments, L tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch

from megatron_vl.errors import InputError


class Segments:
    """T tokens cut into n consecutive segments; attention never crosses a cut.

    Args:
        lengths: n positive token counts, in order.
        device: where the index tensors live.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.lengths = [int(length) for length in lengths]
        if not self.lengths or min(self.lengths) < 1:
            raise InputError(f"segment lengths {self.lengths} must be one or more positive counts.")
        self.device = torch.device(device)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: torch.Tensor, device: torch.device | str = "cpu"
    ) -> Segments:
        """From the n+1 cumulative lengths int32[n+1], on the host, of kernels on `device`."""
        return cls(cu_seqlens.diff().tolist(), device)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 [n+1] on `device`."""
        total = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return total.to(self.device, non_blocking=True)

    @cached_property
    def equal_buckets(self) -> Buckets:
        """Segments of equal length gathered into rectangles without padding."""
        return Buckets(self._make_buckets(0.0))

    @cached_property
    def padded_buckets(self) -> Buckets:
        """Segments of like length in rectangles whose rows may be padded by up to a quarter."""
        return Buckets(self._make_buckets(0.25))

    def _make_buckets(self, padding: float) -> list[Bucket]:
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        buckets, current = [], []
        for i in order:
            if current and self.lengths[i] < (1 - padding) * self.lengths[current[0]]:
                buckets.append(current)
                current = []
            current.append(i)
        buckets.append(current)
        return [
            Bucket([starts[i] for i in sorted(rows)], [self.lengths[i] for i in sorted(rows)],
                   self.device)
            for rows in buckets
        ]


def segment_numbers(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """The segment of every token, int64 [T], of int32 [n+1] cumulative lengths on the host."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


class Buckets:
    """All rectangles of a row's segments, and the way back to packed order.

    Attributes:
        restore: int64 [T], for every packed token its place in the buckets' kept cells laid end
            to end; None when one slice holds everything in order already.
    """

    def __init__(self, buckets: list[Bucket]):
        self.buckets = buckets
        in_order = len(buckets) == 1 and buckets[0].contiguous is not None
        self.restore = None if in_order else torch.cat([b.tokens for b in buckets]).argsort()

    def __iter__(self):
        return iter(self.buckets)


class Bucket:
    """Some segments as a rectangle of m rows and L columns.

    Attributes:
        shape: (m, L).
        gather: int64 [m*L], the packed token behind each cell; a padding cell repeats the
            segment's last token.
        kept: int64 [t], cells that are no padding; None when every cell is kept.
        contiguous: (start, stop) when the rectangle is one uninterrupted slice of the packed
            tokens, else None.
    """

    def __init__(self, starts: list[int], lengths: list[int], device: torch.device):
        width = max(lengths)
        self.shape = (len(starts), width)
        first = torch.tensor(starts)[:, None]
        count = torch.tensor(lengths)[:, None]
        column = torch.arange(width)[None, :]
        self.gather = (first + torch.minimum(column, count - 1)).flatten().to(
            device, non_blocking=True
        )
        whole = min(lengths) == width
        kept = None if whole else (column < count).flatten().nonzero().flatten()
        self.kept = None if kept is None else kept.to(device, non_blocking=True)
        neighbours = all(a + width == b for a, b in pairwise(starts))
        self.contiguous = (starts[0], starts[0] + width * len(starts)) if whole and neighbours \
            else None

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [t]: packed tokens of the kept cells, in cell order."""
        return self.gather if self.kept is None else self.gather[self.kept]
