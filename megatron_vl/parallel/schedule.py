"""The order in which a pipeline's stage runs microbatches, as Megatron-Core's schedules have it.

A stage runs its operations in a fixed order: forwards of the warm-up, then one forward and one
backward in turn (1F1B), then backwards of the cool-down.

Letters: p stages, v chunks of a stage, m microbatches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import le


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


@lru_cache(maxsize=4096)
def in_flight(stage: int, *, p: int, v: int, m: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each of a stage's chunks: how many microbatches every chunk keeps while that one works.

    The one it works on is included. Of counts that are no larger in any chunk than others, only
    the others are given; what is kept grows with every count.
    """
    counts, seen = [0] * v, [set() for _ in range(v)]
    for one in operations(stage, p=p, v=v, m=m):
        counts[one.chunk] += not one.backward
        seen[one.chunk].add(tuple(counts))
        counts[one.chunk] -= one.backward
    return tuple(tuple(_largest(those)) for those in seen)


def _largest(those: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    largest = []
    for one in sorted(those, key=sum, reverse=True):
        if not any(all(map(le, one, other)) for other in largest):
            largest.append(one)
    return largest
