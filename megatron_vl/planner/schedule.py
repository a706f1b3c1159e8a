"""A step's pipeline, event by event, as Megatron-Core's schedules run it; no torch.

A message between stages, hidden states or their gradient, moves once its sender has it and its
receiver asks for it. When a stage asks, and that it waits for what it sends as for what it
receives, is as in `forward_backward_pipelining_without_interleaving` and `.._with_interleaving` of
megatron/core/pipeline_parallel/schedules.py, 0.16.1.

Letters: p stages, v chunks of a stage, m microbatches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_vl.parallel import Operation, operations, warm_up

Rows = Sequence[Sequence[float]]  # seconds of a microbatch, [chunk][stage]
Message = tuple[int, int, bool] | None  # (microbatch, to which chunk of all, backward)


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


class _Messages:
    """Those between stages.

    Attributes:
        there: when they had moved.
        moved: stages that such a message may let go on.
    """

    def __init__(self, transfer: float):
        self.transfer, self.moved = transfer, set()
        self.there: dict[Message, float] = {None: 0.0}
        self._one_side: dict[Message, tuple[float, int]] = {}

    def meet(self, message: Message, now: float, stage: int) -> None:
        """A stage has it, or asks for it."""
        if message is None:
            return
        if message not in self._one_side:
            self._one_side[message] = now, stage
            return
        before, other = self._one_side.pop(message)
        assert other != stage, "a stage is ready for a message twice"
        self.there[message] = max(now, before) + self.transfer
        self.moved.add(other)


class _Stage:
    """A stage, whose programs yield the messages that they wait for."""

    def __init__(
        self, stage: int, p: int, v: int, m: int, messages: _Messages,
        seconds: tuple[Sequence[Rows], Sequence[Rows]],
    ):
        self.stage, self.messages, self.seconds = stage, messages, seconds
        self.now = self.busy = 0.0
        self.ran: list[Ran] = []
        self.order = list(operations(stage, p=p, v=v, m=m))
        self.warm_up = warm_up(stage, p=p, v=v, m=m)
        self.cool_down = len(self.order) - self.warm_up
        self.needs: list[Message] = []
        self.sends: list[Message] = []
        for one in self.order:
            place, step = one.chunk * p + stage, -1 if one.backward else 1
            for found, to, there in ((self.needs, place, 0 <= place - step < p * v),
                                     (self.sends, place + step, 0 <= place + step < p * v)):
                found.append((one.microbatch, to, one.backward) if there and p > 1 else None)

    def run(self, at: int) -> None:
        """An operation; what it made can be sent then."""
        one, start = self.order[at], self.now
        kinds = self.seconds[one.backward]
        taken = kinds[one.microbatch % len(kinds)][one.chunk][self.stage]
        self.now, self.busy = start + taken, self.busy + taken
        self.ran.append(Ran(one, start, self.now))
        self.messages.meet(self.sends[at], self.now, self.stage)

    def ask(self, at: int) -> None:
        """For what an operation needs."""
        if at < len(self.order):
            self.messages.meet(self.needs[at], self.now, self.stage)

    def without_virtual_stages(self) -> Iterator[list[Message]]:
        self.ask(0)
        for at, needed in enumerate(self.needs):
            yield [needed]
            self.run(at)
            if both := self.warm_up <= at < self.cool_down - 1:  # both ways at once
                self.ask(at + 1)
            yield [self.sends[at]]
            if not both:
                self.ask(at + 1)

    def with_virtual_stages(self) -> Iterator[list[Message]]:
        """Between warm-up and cool-down, where forward and backward take turns, messages overlap:
        a stage waits for the send before its last in a direction."""
        self.ask(0)
        for at, needed in enumerate(self.needs):
            yield [needed]
            self.run(at)
            if not self.warm_up <= at < self.cool_down:
                self.ask(at + 1)
                yield [self.sends[at], *self.needs[at + 1:at + 2]]
                if at == self.warm_up - 1 < self.cool_down - 1:  # and the first backward's
                    self.ask(at + 2)
            else:
                if self.order[at].backward or at + 2 < self.cool_down:
                    self.ask(min(at + 2, self.cool_down))
                yield [self.sends[at - 2]] if at - 2 >= self.warm_up else []
                if at == self.cool_down - 1:
                    yield [self.sends[at]]


def simulate(
    forward: Sequence[Rows], backward: Sequence[Rows], *, microbatches: int, transfer: float
) -> Pipeline:
    """A step.

    Args:
        forward: of microbatches that differ; they come in turn until there are `microbatches`.
        backward: of the same.
        transfer: seconds of a message from one chunk to the next, or back.
    """
    v, p = len(forward[0]), len(forward[0][0])
    messages = _Messages(transfer)
    stages = [_Stage(stage, p, v, microbatches, messages, (forward, backward))
              for stage in range(p)]
    programs = [one.with_virtual_stages() if v > 1 else one.without_virtual_stages()
                for one in stages]
    waits, ready = [next(program) for program in programs], set(range(p))
    while ready:
        at = ready.pop()
        while waits[at] is not None and all(one in messages.there for one in waits[at]):
            for one in waits[at]:
                stages[at].now = max(stages[at].now, messages.there[one])
            waits[at] = next(programs[at], None)
        ready |= messages.moved
        messages.moved.clear()
    assert not any(waits), "it hangs"
    return Pipeline(ends=tuple(one.now for one in stages), busy=tuple(one.busy for one in stages),
                    timeline=tuple(tuple(one.ran) for one in stages))
