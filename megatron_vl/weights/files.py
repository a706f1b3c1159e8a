"""Where a tensor's bytes lie in a file: read and written by byte range.

Every checkpoint format is opened once for its table of contents; from then on a tensor is a path,
an offset, a format and a shape. Memory is what a caller reads at a time.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_vl.errors import InputError
from megatron_vl.pickles import unchanged
from megatron_vl.weights.dtypes import DType
from megatron_vl.weights.rules import box

WHOLE_BYTES = 16 * 2**20  # a larger file is known by its size and slices of it
_SLICES, _SLICE = 64, 2**14  # spread over it, its ends among them; bytes of each
# Filled at once: a page fault for every few pages would take longer than the copy. Not on systems
# that know no such flag.
_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_POPULATE", 0)
_IOV_MAX = 1024  # buffers that one call writes, at least, on every system


def fingerprint(path: Path) -> str:
    """What tells a file from others, wherever it lies. Raises OSError: it cannot be read."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            for number in range(_SLICES):
                file.seek(number * (size - _SLICE) // (_SLICES - 1))
                digest.update(file.read(_SLICE))
    return f"{size} bytes {digest.hexdigest()[:12]}"


@unchanged  # it is handed to pickles, which may name any state
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TensorAt:
    """One contiguous tensor in a file, or, where that is not so, an array of its bits."""

    path: Path
    offset: int  # bytes from the start of the file
    dtype: DType
    shape: tuple[int, ...]
    loaded: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def part(self, number: int) -> TensorAt:
        """What it holds at one place of its first dimension."""
        shape, loaded = self.shape[1:], self.loaded
        return replace(
            self, shape=shape, offset=self.offset + number * prod(shape) * self.dtype.itemsize,
            loaded=None if loaded is None else loaded[number],
        )

    def read(self, file: int | None, start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """The bits of the box of extents `shape` at `start`; read only, it may be the file.

        Args:
            file: descriptor of `path`, open for reading; None when `loaded`.

        Raises:
            InputError: the file ends before the box does.
        """
        if self.loaded is not None:
            return self.loaded[box(start, shape)]
        span, first = self._span(start, shape)
        offset, nbytes = self.offset + first * self.dtype.itemsize, prod(span) * self.dtype.itemsize
        skip = offset % mmap.ALLOCATIONGRANULARITY
        try:
            rows = mmap.mmap(file, nbytes + skip, _MAP_FLAGS, mmap.PROT_READ, offset=offset - skip)
        except ValueError as error:
            raise InputError(f"{self.path} ends too early; copy or download it again.") from error
        # The view keeps the mapping alive.
        view = np.ndarray(span, self.dtype.bits, rows, skip)
        if tuple(span) != tuple(shape):
            within = [a if n == s else 0 for a, n, s in zip(start, span, self.shape, strict=True)]
            view = view[box(within, shape)]
        return view

    def write(self, file: int, row: int, buffers: Sequence[np.ndarray]) -> None:
        """Writes contiguous arrays of bits one after the other, from a row on."""
        offset = self.offset + row * prod(self.shape[1:]) * self.dtype.itemsize
        for low in range(0, len(buffers), _IOV_MAX):
            some = buffers[low : low + _IOV_MAX]
            done, size = os.pwritev(file, some, offset), sum(one.nbytes for one in some)
            if done < size:  # an interrupt, or a disk that is full: that the next write says
                rest = memoryview(b"".join(some))
                while done < size:
                    done += os.pwrite(file, rest[done:], offset + done)
            offset += size

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


def reserve(file: BinaryIO, size: int) -> None:
    """Makes a file `size` bytes long, with its place on the disk taken where the system can.

    Filling it is then faster, and a disk that is too small says so before anything is written.

    Raises:
        OSError: it does not fit.
    """
    # Not os.posix_fallocate: where a file system has no such call, that writes every block.
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is not None and size:
        file.flush()
        call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if call(file.fileno(), 0, 0, size) and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT,
                                                                      errno.EFBIG):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)
    file.truncate(size)
