"""From the inventories of two checkpoints to the slices that turn one into the other; no I/O.

Both inventories say which box of which published tensor lies where. The plan is their intersection,
so it needs neither rules nor names nor layouts, and every pair of formats uses the same one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_vl.errors import InputError
from megatron_vl.weights.map import Stored, volume
from megatron_vl.weights.rules import Piece


@dataclass(frozen=True, slots=True)
class Op:
    """`target[at : at + shape] = source[start : start + shape]`.

    `start` and `at` have as many numbers as their tensors have dimensions; where one has dimensions
    of layers or experts in front, `shape` is that of the shorter one. What is read `turned` is
    transposed: `target[at : at + shape] = source[start : start + reversed(shape)].T`.
    """

    source: Stored
    start: tuple[int, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]
    turned: bool = False

    @property
    def read(self) -> tuple[int, ...]:
        """Extents of the source's box."""
        return self.shape[::-1] if self.turned else self.shape


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How one tensor of the target is written: each element once."""

    target: Stored
    ops: tuple[Op, ...]
    zeros: int  # elements no op covers: padding


@dataclass(frozen=True, slots=True)
class Twin:
    """Two boxes of the source that must hold the same numbers, and what they hold."""

    key: str
    first: Stored
    first_at: tuple[int, ...]
    second: Stored
    second_at: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """All that is to be done, and what can be checked on the way."""

    tensors: tuple[TensorPlan, ...]
    twins: tuple[Twin, ...]

    @property
    def num_ops(self) -> int:
        return sum(len(one.ops) for one in self.tensors)

    def lines(
        self, files: Mapping[str, Sequence[Stored]],
        itemsizes: Mapping[tuple[str, str, str], int],
    ) -> list[str]:
        """The plan for people: every slice, then tensors and bytes of each of the target's files.

        Args:
            files: what each of the target's files holds.
            itemsizes: bytes of a number, of the target's tensors by their ids.
        """
        of = {one.target.id: one for one in self.tensors}
        lines, totals = [], []
        for file, group in files.items():
            for stored in group:
                one = of[stored.id]
                name = str(stored) if stored.file else f"{file}:{stored}"
                lines.append(f"{name} {list(stored.shape)}")
                lines += [f"    {_words(op.at, op.shape)} = {op.source}{_words(op.start, op.read)}"
                          f"{'.T' if op.turned else ''}" for op in one.ops]
                if one.zeros:
                    lines.append(f"    {one.zeros} elements of padding = 0")
            totals.append(sum(stored.numel * itemsizes[stored.id] for stored in group))
        lines += [f"{file}: {len(group)} tensors, {size:,} bytes"
                  for (file, group), size in zip(files.items(), totals, strict=True)]
        lines.append(
            f"total: {len(files)} files, {len(self.tensors)} tensors, {self.num_ops} slices, "
            f"{sum(totals):,} bytes"
        )
        return lines


def make_plan(
    source: Iterable[Stored], target: Iterable[Stored], *, everything: bool = True
) -> CopyPlan:
    """The slices that fill every tensor of `target` from those of `source`.

    Args:
        everything: the target is the whole model; one rank's part has no place for all.

    Raises:
        InputError: an element of the target that the source does not hold, or a tensor of the
            source that the target has no place for.
    """
    held, twins = holders(source)
    tensors, used = [], set()
    for stored in target:
        ops, covered = [], 0
        for piece in stored.pieces:
            if piece.key is None:
                continue
            size = 0
            for holder, at in held.get(piece.key, ()):
                common = _intersect(holder, at, piece)
                if common is None:
                    continue
                ops.append(common)
                used.add(holder.id)
                size += volume(common.shape)
            if size != volume(piece.shape):
                raise InputError(
                    f"{stored} needs {volume(piece.shape)} elements of {piece.key} but the source "
                    f"holds {size} of them; use a complete checkpoint."
                )
            covered += size
        ops.sort(key=lambda op: op.at)
        tensors.append(TensorPlan(stored, tuple(ops), stored.numel - covered))
    idle = sorted({str(holder) for holders in held.values() for holder, _ in holders
                   if holder.id not in used})
    if idle and everything:
        raise InputError(f"the target has no place for {', '.join(idle)}.")
    return CopyPlan(tuple(tensors), tuple(twins))


def holders(
    source: Iterable[Stored],
) -> tuple[Mapping[str, list[tuple[Stored, Piece]]], list[Twin]]:
    """Who holds each published tensor: boxes that overlap nowhere, and the twins of some."""
    held: dict[str, list[tuple[Stored, Piece]]] = defaultdict(list)
    seen: dict[tuple, tuple[Stored, Piece]] = {}
    twins = []
    for stored in source:
        for piece in stored.pieces:
            if piece.key is None:
                continue
            box = (piece.key, piece.start, piece.shape)
            if box in seen:
                first, at = seen[box]
                twins.append(Twin(piece.key, first, at.at, stored, piece.at, piece.shape))
            else:
                seen[box] = (stored, piece)
                held[piece.key].append((stored, piece))
    return held, twins


def _intersect(holder: Stored, have: Piece, want: Piece) -> Op | None:
    low = tuple(map(max, have.start, want.start))
    high = [min(h + n, w + m) for h, n, w, m in
            zip(have.start, have.shape, want.start, want.shape, strict=True)]
    shape = tuple(b - a for a, b in zip(low, high, strict=True))
    if any(size <= 0 for size in shape):
        return None
    return Op(holder, _moved(have, low), _moved(want, low), shape[::-1] if want.turned else shape,
              turned=have.turned != want.turned)


def _moved(piece: Piece, low: Sequence[int]) -> tuple[int, ...]:
    """Where published element `low` lies in the tensor that stores `piece`."""
    front = len(piece.at) - len(low)
    moved = [x - s for x, s in zip(low, piece.start, strict=True)]
    if piece.turned:
        moved.reverse()
    return (*piece.at[:front], *(a + m for a, m in zip(piece.at[front:], moved, strict=True)))


def _words(start: Sequence[int], shape: Sequence[int]) -> str:
    """A box for people."""
    front = [str(one) for one in start[: len(start) - len(shape)]]
    inner = [f"{a}:{a + n}" for a, n in zip(start[len(front) :], shape, strict=True)]
    return f"[{', '.join(front + inner)}]"
