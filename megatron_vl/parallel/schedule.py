"""The order in which a pipeline's stage runs microbatches, as Megatron-Core's schedules have it.

A stage runs its operations in a fixed order: forwards of the warm-up, then one forward and one
backward in turn (1F1B), then backwards of the cool-down.

Letters: p stages, v chunks of a stage, m microbatches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from operator import le
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Operation:
    """The forward or backward of one microbatch through one chunk; all count from 0."""

    microbatch: int
    chunk: int
    backward: bool


def warm_up(stage: int, *, p: int, v: int, m: int) -> int:
    """How many operations a stage runs forward before the first after which it runs one back."""
    before = p - stage - 1 if v == 1 else 2 * (p - stage - 1) + (v - 1) * p
    return min(before if p > 1 else 0, m * v)


def operations(stage: int, *, p: int, v: int, m: int) -> Iterator[Operation]:
    """What a stage runs, in order. With v > 1, m is a multiple of p."""
    total = m * v
    # Microbatches go through a chunk in groups of p, and a group through all chunks.
    at = [(k // (p * v) * p + k % p, k // p % v) for k in range(total)]
    before = warm_up(stage, p=p, v=v, m=m)
    for k in range(total + before):
        if k < total:
            microbatch, chunk = at[k]
            yield Operation(microbatch, chunk, False)
        if k >= before:
            microbatch, chunk = at[k - before]
            yield Operation(microbatch, v - 1 - chunk, True)


class Flights(NamedTuple):
    """What a stage holds at once while one of its chunks works, of every largest case.

    Each case counts the microbatches that every chunk keeps, the one worked on included; its last
    number is of tensors sent between stages that are held beside those.
    """

    forward: tuple[tuple[int, ...], ...]
    backward: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=4096)
def in_flight(stage: int, *, p: int, v: int, m: int) -> tuple[Flights, ...]:
    """For each of a stage's chunks, what is held while that one works.

    Of cases that are no larger in any number than others, only the others are given; memory grows
    with every number.
    """
    counts, seen = [0] * v, [(set(), set()) for _ in range(v)]
    run = tuple(operations(stage, p=p, v=v, m=m))
    exchanged = (_exchanged(run, stage, p=p, m=m) if v == 1
                 else _exchanged_between_chunks(run, stage, p=p, v=v, m=m))
    for one, sent in zip(run, exchanged, strict=True):
        counts[one.chunk] += not one.backward
        seen[one.chunk][one.backward].add((*counts, sent))
        counts[one.chunk] -= one.backward
    return tuple(Flights(*(tuple(_largest(those)) for those in both)) for both in seen)


def _exchanged(run: Sequence[Operation], stage: int, *, p: int, m: int) -> Iterator[int]:
    """Of 1F1B, the tensors held beside those of the microbatches kept, at each operation."""
    borders = (stage > 0) + (stage < p - 1)
    for one in run:
        # The gradients of what left, which has come, and of what entered, which has been sent
        # back; in a later forward also what these are of.
        yield borders * (1 + (not one.backward and m > p - stage))


def _exchanged_between_chunks(
    run: Sequence[Operation], stage: int, *, p: int, v: int, m: int
) -> Iterator[int]:
    """The same of interleaved stages, whose exchanges run beside the computation."""
    before = warm_up(stage, p=p, v=v, m=m)

    def received(one: Operation) -> bool:
        end = (p - 1, v - 1) if one.backward else (0, 0)
        return (stage, one.chunk) != end

    # The schedule's own name for what came last in the warm-up stays until the step's end, and the
    # gradient of that with it.
    stays = run[before] if before < m * v and received(run[before]) else None
    stayed = sent_back = 0
    for one, following in zip_longest(run, run[1:]):
        ahead = following and following.backward != one.backward and received(following)
        own = one.backward and received(one)
        yield sent_back + stayed + bool(ahead) + own
        if one.backward:
            stayed += stayed == 1
            sent_back = (stage, one.chunk) != (0, 0)
            if replace(one, backward=False) == stays:
                stayed = 1  # its gradient is what has just been sent back


def _largest(those: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    largest = []
    for one in sorted(those, key=sum, reverse=True):
        if not any(all(map(le, one, other)) for other in largest):
            largest.append(one)
    return largest
