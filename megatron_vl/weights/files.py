"""Where a tensor's bytes lie in a file: read and written by byte range, never through a mapping.

Every checkpoint format is opened once for its table of contents; from then on a tensor is a path,
an offset, a dtype and a shape. Memory is what a caller reads at a time.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
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


@contextlib.contextmanager
def replacing(target: Path, *, overwrite: bool, reads: Iterable[Path]) -> Iterator[Path]:
    """A new directory beside `target` that takes its place when the block ends without an error.

    Until then `target` is untouched; on an error nothing is left behind. What a killed run of this
    machine left beside `target` is mended first.

    Args:
        reads: files and directories that the block reads.

    Raises:
        InputError: `target` is a file, or exists and is not empty without `overwrite`, or holds
            one of `reads`, or cannot be written.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a directory.")
    for path in reads:
        if _holds(target, path):
            raise InputError(f"{target} holds {path}, which is read here; choose another target.")
    host = socket.gethostname()
    temporary = target.with_name(f".{target.name}.partial-{host}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _mend_abandoned(target, host)
        if target.is_dir() and any(target.iterdir()) and not overwrite:
            raise InputError(f"{target} exists and is not empty; remove it or pass --overwrite.")
        temporary.mkdir()
        yield temporary
        _swap(temporary, target)
    except OSError as error:
        raise InputError(
            f"writing {target} failed: {error.strerror or error}; free space or choose another "
            f"target."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _holds(target: Path, path: Path) -> bool:
    """Whether `path` is `target` or in it, by its name or by where a link leads."""
    named, real = path.parent.resolve() / path.name, path.resolve()
    return any(one.is_relative_to(target) for one in (named, real))


def _swap(new: Path, target: Path) -> None:
    """Puts `new` in `target`'s place and the old `target`, to be removed, in `new`'s."""
    if not target.exists():
        new.rename(target)
        return
    old = new.with_name(new.name.replace(".partial-", ".replaced-"))
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    # So that a `.replaced-` directory is always whole, however far its removal came.
    old.rename(new)


def _mend_abandoned(target: Path, host: str) -> None:
    """Puts back what a run that was killed in `_swap` took away; removes what is not needed."""
    for kind in ("replaced", "partial"):
        prefix = f".{target.name}.{kind}-{host}-"
        for left in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
            if not _is_abandoned(left.name.removeprefix(prefix)):
                continue
            if kind == "replaced" and not target.exists():
                left.rename(target)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _is_abandoned(pid: str) -> bool:
    """Whether the process that made a directory is gone; this one has made none yet."""
    if not pid.isdigit() or not Path("/proc/self").exists():
        return False
    return int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists()
