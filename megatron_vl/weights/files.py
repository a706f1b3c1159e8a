"""Where a tensor's bytes lie in a file: read and written by byte range, never through a mapping.

Every checkpoint format is opened once for its table of contents; from then on a tensor is a path,
an offset, a dtype and a shape. Memory is what a caller reads at a time.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from megatron_vl.errors import InputError

# Filled at once: a page fault for every few pages would take longer than the copy. Not on systems
# that know no such flag.
_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_POPULATE", 0)
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TensorAt:
    """One contiguous tensor in a file, or, for the formats that allow no better, in memory."""

    path: Path
    offset: int  # bytes from the start of the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    loaded: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self, file: int | None, start: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """The box of extents `shape` at `start`, of this dtype; read only, it may be the file.

        Args:
            file: descriptor of `path`, open for reading; None when `loaded`.

        Raises:
            InputError: the file ends before the box does.
        """
        if self.loaded is not None:
            return self.loaded[_slices(start, shape)]
        span, first = self._span(start, shape)
        offset, nbytes = self.offset + first * self.dtype.itemsize, prod(span) * self.dtype.itemsize
        skip = offset % mmap.ALLOCATIONGRANULARITY
        try:
            rows = mmap.mmap(file, nbytes + skip, _MAP_FLAGS, mmap.PROT_READ, offset=offset - skip)
        except ValueError as error:
            raise InputError(f"{self.path} ends too early; copy or download it again.") from error
        # The view keeps the mapping alive; narrower than the rows it lies in, only its own pages
        # are read. numpy, because the bytes may start anywhere and torch wants them aligned.
        view = np.ndarray(span, f"i{self.dtype.itemsize}", rows, skip)
        if tuple(span) != tuple(shape):
            within = [a if n == s else 0 for a, n, s in zip(start, span, self.shape, strict=True)]
            view = view[_slices(within, shape)]
        if skip % self.dtype.itemsize:
            view = view.copy()
        return torch.from_numpy(view).view(self.dtype)

    def write(self, file: int, start: Sequence[int], tensor: torch.Tensor) -> None:
        """Writes a contiguous box of whole rows (`start` is 0 after the first dimension)."""
        offset = self.offset + start[0] * prod(self.shape[1:]) * self.dtype.itemsize
        view = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
        done = 0
        while done < len(view):
            done += os.pwrite(file, view[done:], offset + done)

    def _span(self, start: Sequence[int], shape: Sequence[int]) -> tuple[list[int], int]:
        """(extents, first element) of the smallest contiguous run that holds the box."""
        span, first, inside = list(shape), 0, False
        for d, full in enumerate(self.shape):
            if inside:
                span[d] = full
            else:
                first += start[d] * prod(self.shape[d + 1 :])
                inside = shape[d] != 1
        return span, first


def _slices(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
