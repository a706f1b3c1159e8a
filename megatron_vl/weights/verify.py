"""Whether two checkpoints of any kind and layout hold the same tensors, bit by bit.

Both are read as published tensors, a run of rows at a time, by the plans that would convert them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from megatron_vl.weights.convert import Source
from megatron_vl.weights.dtypes import DType, cast, numbers
from megatron_vl.weights.map import Stored, volume, whole_tensor
from megatron_vl.weights.plan import CopyPlan, TensorPlan, Twin, holders, make_plan
from megatron_vl.weights.reshard import (
    SPAN,
    Reader,
    chunks,
    enough,
    target_dtypes,
    twin_differs,
)
from megatron_vl.workers import in_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One published tensor in both checkpoints."""

    name: str
    dtypes: tuple[DType, DType]
    numel: int
    differing: int  # elements whose bits differ; all of them if the dtypes may not
    largest: float  # absolute difference; 0 where only bits differ, inf where one is no number

    @property
    def equal(self) -> bool:
        return self.differing == 0

    @property
    def nbytes(self) -> int:
        """Of the first checkpoint's."""
        return self.numel * self.dtypes[0].itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two checkpoints, tensor by tensor, in the order of the model."""

    tensors: tuple[Compared, ...]
    missing: tuple[tuple[str, ...], tuple[str, ...]]  # published names that each of them lacks
    inconsistent: tuple[tuple[str, ...], tuple[str, ...]]  # copies inside each that differ

    @property
    def equal(self) -> bool:
        return all(one.equal for one in self.tensors) and not any(
            (*self.missing, *self.inconsistent)
        )


def compare(
    first: Source,
    second: Source,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    tolerant: bool = False,
    workers: int = 2,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> Comparison:
    """Compare what two opened checkpoints hold; `progress` is told bytes of the first.

    Args:
        shapes: of the published tensors to compare.
        tolerant: compare tensors of different dtypes after casting to the narrower one, to the
            second's where both are as wide; without, they differ.

    Raises:
        InputError: a file that ends too early.
    """
    whole = [_complete(source, shapes) for source in (first, second)]
    missing = tuple(tuple(name for name in shapes if name not in held) for held in whole)
    wanted = [whole_tensor(name, shape) for name, shape in shapes.items()
              if name in whole[0] and name in whole[1]]
    names = {stored.name for stored in wanted}
    plans = [_plan(source, wanted, names) for source in (first, second)]
    with contextlib.ExitStack() as stack:
        readers = [Reader(source.tensors, stack, source.updates) for source in (first, second)]
        dtypes = [target_dtypes(plan, source.dtypes, None)
                  for plan, source in zip(plans, (first, second), strict=True)]

        def check(one: tuple[Reader, Twin] | tuple[TensorPlan, TensorPlan]) -> bool | Compared:
            if isinstance(one[1], Twin):
                return one[0].differ(one[1])
            of = tuple(found[plan.target.id] for found, plan in zip(dtypes, one, strict=True))
            return _compare(one, readers, of, tolerant)

        twins = [[(reader, twin) for twin in plan.twins]
                 for plan, reader in zip(plans, readers, strict=True)]
        pairs = list(zip(plans[0].tensors, plans[1].tensors, strict=True))
        answers = in_parallel(check, [*twins[0], *twins[1], *pairs],
                              enough(workers, first.tensors.values()))
        inconsistent = tuple(
            tuple(twin_differs(twin) for _, twin in some if next(answers)) for some in twins
        )
        compared = []
        for one in answers:
            progress(one.nbytes)
            compared.append(one)
    return Comparison(tensors=tuple(compared), missing=missing, inconsistent=inconsistent)


def _complete(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The published tensors that are there in full."""
    held, _ = holders(source.inventory)
    return {name for name, shape in shapes.items()
            if sum(volume(piece.shape) for _, piece in held.get(name, ())) == volume(shape)}


def _plan(source: Source, wanted: list[Stored], names: set[str]) -> CopyPlan:
    parts = (replace(stored, pieces=tuple(p for p in stored.pieces if p.key in names))
             for stored in source.inventory)
    return make_plan([stored for stored in parts if stored.pieces], wanted)


def _compare(
    pair: tuple[TensorPlan, TensorPlan], readers: list[Reader],
    dtypes: tuple[DType, DType], tolerant: bool,
) -> Compared:
    common = min(reversed(dtypes), key=lambda dtype: dtype.itemsize)
    differing, largest = 0, 0.0
    row_bytes = max(reader.row_bytes(plan) for reader, plan in zip(readers, pair, strict=True))
    for one, two in _both(pair, readers, dtypes, row_bytes):
        a, b = cast(one, dtypes[0], common), cast(two, dtypes[1], common)
        apart = a != b
        if apart.any():
            differing += int(np.count_nonzero(apart))
            with np.errstate(invalid="ignore"):  # Inf - Inf
                gap = np.abs(numbers(a[apart], common) - numbers(b[apart], common))
            largest = max(largest, float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max()))
    numel = pair[0].target.numel
    return Compared(
        name=pair[0].target.name, dtypes=dtypes, numel=numel, largest=largest,
        differing=differing if tolerant or dtypes[0] == dtypes[1] else numel,
    )


def _both(pair, readers, dtypes, row_bytes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start, stop in chunks(0, pair[0].target.shape[0], row_bytes, SPAN):
        streams = (reader.chunks(plan, (start, stop, plan.ops), dtype, row_bytes)
                   for reader, plan, dtype in zip(readers, pair, dtypes, strict=True))
        for one, two in zip(*streams, strict=True):
            yield one.assembled(), two.assembled()
