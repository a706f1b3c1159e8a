"""A step's pipeline, event by event, in the order of Megatron-Core's schedules; no torch.

An operation starts once the stage is free and what it needs has arrived: hidden states of the
chunk before it, or gradients of the chunk behind it. A transfer delays its receiver and occupies no
stage.

Letters: p stages, v chunks of a stage, m microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.parallel import Operation, operations

Rows = Sequence[Sequence[float]]  # seconds of a microbatch, [chunk][stage]


@dataclass(frozen=True, slots=True)
class Ran:
    """When an operation ran, in seconds from the step's start."""

    operation: Operation
    start: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """Seconds that a step's microbatches take on the stages."""

    ends: tuple[float, ...]  # of every stage's last backward, from the step's start
    busy: tuple[float, ...]  # of every stage
    timeline: tuple[tuple[Ran, ...], ...]  # of every stage, in order

    @property
    def seconds(self) -> float:
        """Until the last stage is done."""
        return max(self.ends)

    @property
    def bubble(self) -> float:
        """Time that stages wait, over the time they work: (p - 1) / (v m) of equal stages."""
        return self.seconds * len(self.busy) / sum(self.busy) - 1

    @property
    def balance(self) -> float:
        """Work of the mean stage over that of the busiest; 1: all are equal."""
        return sum(self.busy) / len(self.busy) / max(self.busy)


def simulate(
    forward: Sequence[Rows], backward: Sequence[Rows], *, microbatches: int, transfer: float
) -> Pipeline:
    """Runs every operation of a step as early as its stage and its input allow.

    Args:
        forward: of microbatches that differ; they come in turn until there are `microbatches`.
        backward: of the same.
        transfer: seconds from one chunk to the next, or back.
    """
    v, p = len(forward[0]), len(forward[0][0])
    orders = [list(operations(stage, p=p, v=v, m=microbatches)) for stage in range(p)]
    next_of, free, busy = [0] * p, [0.0] * p, [0.0] * p
    timeline: list[list[Ran]] = [[] for _ in range(p)]
    arrived: dict[tuple[int, int, bool], float] = {}  # (microbatch, chunk of all, backward)
    for microbatch in range(microbatches):
        arrived[microbatch, 0, False] = 0.0
    transfer = transfer if p > 1 else 0.0
    ready = list(range(p))
    while ready:
        stage = ready.pop()
        order = orders[stage]
        while next_of[stage] < len(order):
            operation = order[next_of[stage]]
            place = operation.chunk * p + stage
            start = arrived.pop((operation.microbatch, place, operation.backward), None)
            if start is None:
                break
            kinds = backward if operation.backward else forward
            seconds = kinds[operation.microbatch % len(kinds)][operation.chunk][stage]
            start = max(start, free[stage])
            end = start + seconds
            timeline[stage].append(Ran(operation, start, end))
            free[stage], busy[stage] = end, busy[stage] + seconds
            next_of[stage] += 1
            if operation.backward:
                to, back = place - 1, True
            elif place == p * v - 1:  # the loss: its gradient is there at once
                to, back = place, True
            else:
                to, back = place + 1, False
            if to >= 0:
                arrived[operation.microbatch, to, back] = end + transfer * (to != place)
                if to % p != stage:
                    ready.append(to % p)
    assert all(done == len(order) for done, order in zip(next_of, orders, strict=True)), "it hangs"
    return Pipeline(ends=tuple(free), busy=tuple(busy), timeline=tuple(map(tuple, timeline)))
