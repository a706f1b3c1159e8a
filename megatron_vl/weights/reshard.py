"""Runs a plan: every tensor of the target is put together and written a run of rows at a time.

Memory is `workers` x a few times `CHUNK`, whatever the model's size: sources are read by byte range
and the target's files were laid out before, so a chunk goes straight to its place.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_vl.errors import InputError
from megatron_vl.weights.files import TensorAt
from megatron_vl.weights.map import volume
from megatron_vl.weights.plan import Op, Plan, TensorPlan, Twin
from megatron_vl.weights.rules import box

# Bytes of target and of source that one worker holds at a time. Small enough that the allocator
# hands the same pages out again: fresh ones would cost more than the copy.
CHUNK = 8 * 2**20

Tensors = Mapping[tuple[str, str, str], TensorAt]


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a run wrote."""

    tensors: int
    nbytes: int
    not_finite: tuple[str, ...]  # names of the target's tensors that hold NaN or Inf


def target_dtypes(
    plan: Plan, source: Mapping[tuple[str, str, str], torch.dtype], dtype: torch.dtype | None
) -> dict[tuple[str, str, str], torch.dtype]:
    """The dtype of every tensor of the target: `dtype`, or the one its sources have.

    Raises:
        InputError: sources of one tensor differ and no dtype is asked for.
    """
    chosen = {}
    for one in plan.tensors:
        found = {source[op.source.id] for op in one.ops}
        if dtype is None and len(found) > 1:
            names = ", ".join(sorted(str(name).removeprefix("torch.") for name in found))
            raise InputError(
                f"{one.target.name} would join tensors of dtypes {names}; pass --dtype to cast."
            )
        chosen[one.target.id] = dtype or found.pop()
    return chosen


def run_plan(
    plan: Plan,
    source: Tensors,
    target: Tensors,
    *,
    workers: int = 2,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Written:
    """Fills the laid-out files of `target` and calls `progress(bytes)` as it goes.

    Raises:
        InputError: a source that ends too early, or copies in the source that differ.
    """
    with contextlib.ExitStack() as stack:
        reader = Reader(source, stack)
        files = _Files(stack)
        for at in target.values():
            files.open(at, os.O_WRONLY)
        run = _Run(reader, target, files, progress)
        for twin, differs in zip(plan.twins, in_threads(reader.differ, plan.twins, workers),
                                 strict=True):
            if differs:
                raise InputError(f"{twin_differs(twin)}; use another checkpoint.")
        bad = [name for name in in_threads(run.tensor, plan.tensors, workers) if name]
    nbytes = sum(at.nbytes for at in target.values())
    return Written(tensors=len(plan.tensors), nbytes=nbytes, not_finite=tuple(bad))


def in_threads(work: Callable, items: Iterable, workers: int) -> list:
    """`work` of every item, in order; the first error ends the others."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


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


class Reader:
    """Puts published tensors, or any others a plan describes, together from a checkpoint.

    Args:
        stack: closes the checkpoint's files.
    """

    def __init__(self, source: Tensors, stack: contextlib.ExitStack) -> None:
        self.source, self.files = source, _Files(stack)
        for at in source.values():
            self.files.open(at, os.O_RDONLY)

    def row_bytes(self, plan: TensorPlan) -> int:
        """Bytes of the widest row among the tensors that take part."""
        tensors = [self.source[op.source.id] for op in plan.ops]
        return max((volume(at.shape[1:]) * at.dtype.itemsize for at in tensors), default=0)

    def chunks(
        self, plan: TensorPlan, dtype: torch.dtype, row_bytes: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of the tensor `plan` makes, so many that they fill CHUNK."""
        shape = plan.target.shape
        for low, high in _chunks(shape[0], row_bytes):
            ops = [clip for op in plan.ops if (clip := _clip(op, low, high))]
            rows = (high - low, *shape[1:])
            if len(ops) == 1 and ops[0].shape == rows:
                yield low, self._read(ops[0]).to(dtype)
                continue
            covered = sum(volume(op.shape) for op in ops) == volume(rows)
            chunk = (torch.empty if covered else torch.zeros)(rows, dtype=dtype)
            for op in ops:
                chunk[box((op.at[0] - low, *op.at[1:]), op.shape)] = self._read(op)
            yield low, chunk

    def differ(self, twin: Twin) -> bool:
        """Whether two copies in the checkpoint are not the same bits."""
        first, second = self.source[twin.first.id], self.source[twin.second.id]
        row = max(at.nbytes // at.shape[0] for at in (first, second))
        for low, high in _chunks(twin.shape[0], row):
            shape = (high - low, *twin.shape[1:])
            one, two = (
                self._read(Op(stored, _down(at, low, len(shape)), (), shape))
                for stored, at in ((twin.first, twin.first_at), (twin.second, twin.second_at))
            )
            if not torch.equal(_bits(one), _bits(two)):
                return True
        return False

    def _read(self, op: Op) -> torch.Tensor:
        at = self.source[op.source.id]
        front = len(op.start) - len(op.shape)
        shape = (*(1,) * front, *op.shape)
        return at.read(self.files(at.path), op.start, shape).reshape(op.shape)


class _Run:
    def __init__(self, reader: Reader, target: Tensors, files: _Files, progress) -> None:
        self.reader, self.target, self.files, self.progress = reader, target, files, progress

    def tensor(self, plan: TensorPlan) -> str | None:
        """Writes one tensor; answers its name if it holds NaN or Inf."""
        at = self.target[plan.target.id]
        file, finite = self.files(at.path), True
        row_bytes = max(self.reader.row_bytes(plan), volume(at.shape[1:]) * at.dtype.itemsize)
        for low, chunk in self.reader.chunks(plan, at.dtype, row_bytes):
            finite = finite and _is_finite(chunk)
            at.write(file, (low,), chunk)
            self.progress(chunk.nbytes)
        return None if finite else plan.target.name


def _chunks(rows: int, row_bytes: int):
    step = max(1, CHUNK // max(1, row_bytes))
    return ((low, min(low + step, rows)) for low in range(0, rows, step))


def _clip(op: Op, low: int, high: int) -> Op | None:
    """The part of `op` that writes target rows [low, high)."""
    first, last = max(op.at[0], low), min(op.at[0] + op.shape[0], high)
    if first >= last:
        return None
    return replace(
        op,
        start=_down(op.start, first - op.at[0], len(op.shape)),
        at=(first, *op.at[1:]),
        shape=(last - first, *op.shape[1:]),
    )


def _down(start: tuple[int, ...], rows: int, dims: int) -> tuple[int, ...]:
    """`start` moved by `rows` on the first of the last `dims` dimensions."""
    front = len(start) - dims
    return (*start[:front], start[front] + rows, *start[front + 1 :])


def _is_finite(chunk: torch.Tensor) -> bool:
    # A sum is NaN or Inf if an element is; only then is it worth looking at each. float16 would
    # overflow, so it is added up in float32; the others take torch's faster way.
    wide = torch.float32 if chunk.dtype == torch.float16 else None
    return bool(torch.isfinite(chunk.sum(dtype=wide))) or bool(torch.isfinite(chunk).all())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


