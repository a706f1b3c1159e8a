"""Runs a plan: every tensor of the target is put together and written a run of rows at a time.

Memory is `workers` x a few times `SPAN`, whatever the model's size: sources are read by byte range
and the target's files were laid out before, so a chunk goes straight to its place.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from megatron_vl.errors import InputError
from megatron_vl.weights.dtypes import FLOAT32, DType, cast, not_finite
from megatron_vl.weights.files import TensorAt
from megatron_vl.weights.map import Stored, volume
from megatron_vl.weights.plan import CopyPlan, Op, TensorPlan, Twin
from megatron_vl.weights.rules import box
from megatron_vl.workers import in_parallel

# Bytes a worker looks at and writes at a time: small enough to be in the processor's cache still
# when they are written.
CHUNK = 2**20
BUFFER = 4096  # bytes from which on pieces are written as they are; shorter ones are joined
SPAN = 32 * 2**20  # bytes a worker maps at a time: mapping every chunk would cost more than copying
SHARED = 2 * SPAN  # bytes from which on work is shared out
TILE = 128  # rows and columns that are transposed at a time

Tensors = Mapping[tuple[str, str, str], TensorAt]
Run = tuple[int, int, Sequence[Op]]  # first row, end, the slices that write them
# Whole rows of a tensor in fp32, of which the first has this number, as they are to be read.
Update = Callable[[int, np.ndarray], np.ndarray]
Updates = Mapping[str, Update]  # by the published name of the tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a run wrote."""

    tensors: int
    nbytes: int
    not_finite: Mapping[str, int]  # NaN and Inf in tensors of the target, by name


def target_dtypes(
    plan: CopyPlan, source: Mapping[tuple[str, str, str], DType], dtype: DType | None
) -> dict[tuple[str, str, str], DType]:
    """The dtype of every tensor of the target: `dtype`, or the one its sources have.

    A rank's part that is all padding has that of the other ranks' parts, under the same name.

    Raises:
        InputError: sources of one tensor differ and no dtype is asked for.
    """
    joined: dict[tuple[str, str, str], set[DType]] = defaultdict(set)
    named: dict[tuple[str, str], set[DType]] = defaultdict(set)
    for one in plan.tensors:
        found = {source[op.source.id] for op in one.ops}
        joined[_whole(one.target)] |= found
        named[one.target.part, one.target.tensor] |= found
    for (*_, tensor), found in joined.items():
        if dtype is None and len(found) > 1:
            names = ", ".join(sorted(one.name for one in found))
            raise InputError(
                f"{tensor} would join tensors of dtypes {names}; pass --dtype to cast."
            )
    return {
        at: dtype or next(iter(joined[file, part, tensor] or named[part, tensor]))
        for one in plan.tensors
        for at, (file, part, tensor) in [(one.target.id, _whole(one.target))]
    }


def _whole(stored: Stored) -> tuple[str, str, str]:
    """What tells a file's tensor from others."""
    return stored.file, stored.part, stored.tensor


def run_plan(
    plan: CopyPlan,
    source: Tensors,
    target: Tensors,
    *,
    updates: Updates = MappingProxyType({}),
    workers: int = 2,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Written:
    """Fills the laid-out files of `target` and calls `progress(bytes)` as it goes.

    Args:
        updates: see `Reader`.

    Raises:
        InputError: a source that ends too early, copies in the source that differ, or an update
            that leaves numbers that are not finite.
    """
    with contextlib.ExitStack() as stack:
        reader = Reader(source, stack, updates)
        files = _Files(stack)
        for at in target.values():
            files.open(at, os.O_WRONLY)
        run = _Run(reader, target, files)
        batches: list[list] = [[twin] for twin in plan.twins]
        batches += _batches((one, rows, run.nbytes(one, rows)) for one in plan.tensors
                            for rows in run.runs(one))
        nbytes, bad = 0, Counter()
        for size, found in in_parallel(run.batch, batches, enough(workers, target.values())):
            progress(size)
            nbytes += size
            bad.update(found)
    return Written(tensors=len(plan.tensors), nbytes=nbytes, not_finite=bad)


def enough(workers: int, tensors: Iterable[TensorAt]) -> int:
    """One worker where starting more takes longer than the work."""
    return workers if sum(at.nbytes for at in tensors) >= SHARED else 1


def _batches(parts: Iterable[tuple[TensorPlan, Run, int]]) -> list[list[tuple[TensorPlan, Run]]]:
    """Parts of one file for a worker to write, files in turn.

    A file takes one write at a time, whoever writes.
    """
    by_file: dict[str, list[list]] = defaultdict(list)
    room: dict[str, int] = defaultdict(int)
    for plan, run, nbytes in parts:
        file = plan.target.file
        if room[file] < nbytes:
            by_file[file].append([])
            room[file] = SPAN
        by_file[file][-1].append((plan, run))
        room[file] -= nbytes
    rounds = itertools.zip_longest(*by_file.values())
    return [batch for one in rounds for batch in one if batch is not None]


def _same(one: np.ndarray, two: np.ndarray) -> bool:
    """np.array_equal, eight bytes at a time where that is possible."""
    if one.flags.c_contiguous and two.flags.c_contiguous and one.nbytes % 8 == 0:
        one, two = one.reshape(-1).view("u8"), two.reshape(-1).view("u8")
    return np.array_equal(one, two)


def twin_differs(twin: Twin) -> str:
    return f"{twin.key} is stored twice and the copies differ ({twin.first} and {twin.second})"


class _Files:
    """One descriptor a file; byte-range reads and writes share it between threads."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack, self._open = stack, {}

    def open(self, at: TensorAt, flags: int) -> None:
        if at.loaded is None and at.path not in self._open:
            self._open[at.path] = os.open(at.path, flags)
            self._stack.callback(os.close, self._open[at.path])

    def __call__(self, path: Path) -> int | None:
        return self._open.get(path)


@dataclass(frozen=True, slots=True)
class Slab:
    """Rows of a tensor as the boxes they were read in; what no box covers is zero."""

    first: int  # row
    shape: tuple[int, ...]
    dtype: DType
    pieces: tuple[tuple[tuple[int, ...], np.ndarray], ...]  # (where in the slab, bits)

    @property
    def nbytes(self) -> int:
        return volume(self.shape) * self.dtype.itemsize

    def assembled(self) -> np.ndarray:
        """The bits as one array."""
        if self._is_covered() and len(self.pieces) == 1:
            return self.pieces[0][1]
        bits = (np.empty if self._is_covered() else np.zeros)(self.shape, self.dtype.bits)
        for at, one in self.pieces:
            bits[box(at, one.shape)] = one
        return bits

    def buffers(self) -> list[np.ndarray]:
        """The bits in order, contiguous each: as they were read, if the pieces are long enough."""
        bits = [one for _, one in sorted(self.pieces, key=lambda piece: piece[0])]
        width = self.shape[1:]
        if self._is_covered():
            if (all(one.shape[1:] == width and one.flags.c_contiguous for one in bits)
                    and self.nbytes >= len(bits) * BUFFER):
                return bits
            if (len(width) == 1 and all(len(one) == self.shape[0] for one in bits)
                    and all(one.strides[-1] == one.itemsize for one in bits)
                    and min(one.nbytes for one in bits) >= self.shape[0] * BUFFER):
                return [row for rows in zip(*bits, strict=True) for row in rows]
        return [np.ascontiguousarray(self.assembled())]

    def _is_covered(self) -> bool:
        return sum(one.size for _, one in self.pieces) == volume(self.shape)


class Reader:
    """Puts published tensors, or any others a plan describes, together from a checkpoint.

    Args:
        stack: closes the checkpoint's files.
        updates: of published tensors that are read as something else than what is stored: computed
            in fp32, cast once.
    """

    def __init__(
        self, source: Tensors, stack: contextlib.ExitStack, updates: Updates = MappingProxyType({})
    ) -> None:
        self.source, self.files, self.updates = source, _Files(stack), updates
        for at in source.values():
            self.files.open(at, os.O_RDONLY)

    def row_bytes(self, plan: TensorPlan) -> int:
        """Bytes of the widest row among the tensors that take part."""
        rows = []
        for op in plan.ops:
            at, layers = self.source[op.source.id], len(op.start) - len(op.shape)
            rows.append(volume(at.shape[layers + 1 :]) * at.dtype.itemsize)
        return max(rows, default=0)

    def chunks(
        self, plan: TensorPlan, run: Run, dtype: DType, row_bytes: int
    ) -> Iterator[Slab]:
        """A run of rows of the tensor `plan` makes, about CHUNK bytes at a time.

        Raises:
            InputError: an update leaves NaN or infinite numbers where there were none.
        """
        start, stop, ops = run
        update = self.updates.get(plan.target.name)
        read_as = dtype if update is None else FLOAT32
        parts = [(op, self._read(op)) for one in ops if (op := _clip(one, start, stop))]
        for first, last in chunks(start, stop, row_bytes, CHUNK):
            pieces = []
            for op, bits in parts:
                low, high = max(op.at[0], first), min(op.at[0] + op.shape[0], last)
                if low < high:
                    rows = bits[low - op.at[0] : high - op.at[0]]
                    pieces.append(((low - first, *op.at[1:]),
                                   cast(rows, self.source[op.source.id].dtype, read_as)))
            slab = Slab(first, (last - first, *plan.target.shape[1:]), read_as, tuple(pieces))
            yield slab if update is None else _updated(slab, update, dtype, plan.target.name)

    def differ(self, twin: Twin) -> bool:
        """Whether two copies in the checkpoint are not the same bits."""
        first, second = self.source[twin.first.id], self.source[twin.second.id]
        if first.dtype != second.dtype:
            return True
        row = max(volume(at.shape[len(at.shape) - len(twin.shape) + 1 :]) * at.dtype.itemsize
                  for at in (first, second))
        for low, high in chunks(0, twin.shape[0], row, SPAN):
            shape = (high - low, *twin.shape[1:])
            one, two = (
                self._read(Op(stored, _down(at, low, len(shape)), (), shape))
                for stored, at in ((twin.first, twin.first_at), (twin.second, twin.second_at))
            )
            if any(not _same(one[a:b], two[a:b])
                   for a, b in chunks(0, high - low, row, CHUNK)):
                return True
        return False

    def _read(self, op: Op) -> np.ndarray:
        at = self.source[op.source.id]
        front = len(op.start) - len(op.shape)
        shape = (*(1,) * front, *op.read)
        bits = at.read(self.files(at.path), op.start, shape).reshape(op.read)
        return _transposed(bits) if op.turned else bits


class _Run:
    def __init__(self, reader: Reader, target: Tensors, files: _Files) -> None:
        self.reader, self.target, self.files = reader, target, files

    def batch(self, batch: list) -> tuple[int, Counter[str]]:
        """Compares twins, writes parts; answers bytes written, and NaN and Inf by tensor."""
        nbytes, bad = 0, Counter()
        for one in batch:
            if isinstance(one, Twin):
                if self.reader.differ(one):
                    raise InputError(f"{twin_differs(one)}; use another checkpoint.")
                continue
            plan, run = one
            nbytes += self.nbytes(plan, run)
            if found := self.write(plan, run):
                bad[plan.target.name] += found
        return nbytes, bad

    def nbytes(self, plan: TensorPlan, run: Run) -> int:
        at = self.target[plan.target.id]
        return (run[1] - run[0]) * volume(at.shape[1:]) * at.dtype.itemsize

    def row_bytes(self, plan: TensorPlan) -> int:
        at = self.target[plan.target.id]
        return max(self.reader.row_bytes(plan), volume(at.shape[1:]) * at.dtype.itemsize)

    def runs(self, plan: TensorPlan) -> Iterator[Run]:
        """The tensor's rows, in parts that a worker takes."""
        row_bytes = self.row_bytes(plan)
        for low, high, ops in _runs(plan, row_bytes):
            for start, stop in chunks(low, high, row_bytes, SPAN):
                yield start, stop, ops

    def write(self, plan: TensorPlan, run: Run) -> int:
        """Writes some rows of a tensor; answers how many NaN or Inf they hold."""
        at, bad = self.target[plan.target.id], 0
        file = self.files(at.path)
        for chunk in self.reader.chunks(plan, run, at.dtype, self.row_bytes(plan)):
            bad += sum(not_finite(bits, at.dtype) for _, bits in chunk.pieces)
            at.write(file, chunk.first, chunk.buffers())
        return bad


def _transposed(bits: np.ndarray) -> np.ndarray:
    """A matrix the other way round, contiguous; by tiles that the processor's cache holds."""
    out = np.empty(bits.shape[::-1], bits.dtype)
    for row in range(0, bits.shape[0], TILE):
        for column in range(0, bits.shape[1], TILE):
            tile = bits[row : row + TILE, column : column + TILE]
            out[column : column + TILE, row : row + TILE] = tile.T
    return out


def _updated(slab: Slab, update: Update, dtype: DType, name: str) -> Slab:
    before = slab.assembled()
    with np.errstate(all="ignore"):  # what is not finite is counted
        after = cast(update(slab.first, before.view("f4")).view("u4"), FLOAT32, dtype)
    if (spoilt := not_finite(after, dtype)) > not_finite(before, FLOAT32):
        raise InputError(
            f"{spoilt:,} numbers of {name} are NaN or infinite in {dtype} once its adapter is "
            f"added; use an earlier checkpoint, or another --dtype."
        )
    return Slab(slab.first, slab.shape, dtype, (((0,) * len(slab.shape), after),))


def _runs(plan: TensorPlan, row_bytes: int) -> Iterator[Run]:
    """The target's rows, cut where another slice begins.

    So that rows that lie in one piece in the source are not put together but handed on. Runs of
    less than a chunk are joined.
    """
    ops = sorted(plan.ops, key=lambda op: op.at[0])
    cuts = sorted({0, plan.target.shape[0], *(op.at[0] for op in ops),
                   *(op.at[0] + op.shape[0] for op in ops)})
    low = taken = 0
    for high, following in zip(cuts[1:], [*cuts[2:], None], strict=True):
        if following is not None and (following - low) * row_bytes <= CHUNK:
            continue
        last = taken
        while last < len(ops) and ops[last].at[0] < high:
            last += 1
        yield low, high, ops[taken:last]
        while taken < len(ops) and ops[taken].at[0] + ops[taken].shape[0] <= high:
            taken += 1
        low = high


def chunks(start: int, stop: int, row_bytes: int, size: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) in parts of at most `size` bytes, or of one row."""
    step = max(1, size // max(1, row_bytes))
    return ((low, min(low + step, stop)) for low in range(start, stop, step))


def _clip(op: Op, low: int, high: int) -> Op | None:
    """The part of `op` that writes target rows [low, high)."""
    first, last = max(op.at[0], low), min(op.at[0] + op.shape[0], high)
    if first >= last:
        return None
    return replace(
        op,
        start=_down(op.start, first - op.at[0], 1 if op.turned else len(op.shape)),
        at=(first, *op.at[1:]),
        shape=(last - first, *op.shape[1:]),
    )


def _down(start: tuple[int, ...], rows: int, dims: int) -> tuple[int, ...]:
    """`start` moved by `rows` on the first of the last `dims` dimensions."""
    front = len(start) - dims
    return (*start[:front], start[front] + rows, *start[front + 1 :])
