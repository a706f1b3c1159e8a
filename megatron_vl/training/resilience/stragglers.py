"""Which rank keeps the others waiting.

A rank's time is what its chunks' forward passes take, without the wait for rows and for other
stages; backward takes about twice as long on the same device. Inside a pass tensor- and
context-parallel ranks wait for each other, so those that share rows are known as one. Only ranks
that hold the same layers are compared: replicas of one pipeline stage. With one replica there is
nothing to compare, and the times are still told.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch

from megatron_vl.parallel import Coordinates, Layout
from megatron_vl.platform.init import ranks as numbers

WINDOW = 10  # latest steps that are looked at: rows differ, and one slow step names nobody
FEWEST = 3  # steps before anybody is named
SLOWER = 1.25  # times the middle one of the others of its stage
MATTERS = 0.05  # of the step that its delay must be


class PassClock:
    """Device time of this rank's forward or backward passes since the last look."""

    def __init__(self, platform):
        self.platform = platform
        self._started: object = None
        self._spans: list[tuple] = []

    def start(self, barrier: bool = False) -> None:
        """`barrier` is what Megatron-Core gives its timers, for passes never true."""
        self._started = self.platform.mark()

    def stop(self) -> None:
        self._spans.append((self._started, self.platform.mark()))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        yield
        self.stop()

    def take_seconds(self) -> float:
        """The passes must have run, as they have once the loss they led to was read."""
        spans, self._spans = self._spans, []
        return sum(self.platform.seconds_between(*span) for span in spans)


class BackwardTimers:
    """The `timers` of a model's config: Megatron-Core's schedules tell them of each backward pass
    of a chunk, and of much else, which is let pass."""

    def __init__(self, clock: PassClock):
        self.clock = clock

    def __call__(self, name: str, log_level: int = 0) -> PassClock | BackwardTimers:
        return self.clock if name == "backward-compute" else self

    def start(self, barrier: bool = False) -> None:
        """Of another timer."""

    def stop(self) -> None:
        """Of another timer."""


def gather(values: list[float], device: torch.device) -> list[list[float]]:
    """Every rank's `values`, in the order of ranks, on every rank; waits for what is queued."""
    mine = torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)
    world = torch.distributed.get_world_size()
    everyone = mine.new_empty(world * len(values))
    torch.distributed.all_gather_into_tensor(everyone, mine)
    return everyone.view(world, len(values)).tolist()


def host_names() -> list[str]:
    """Every rank's host, on every rank."""
    hosts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(hosts, socket.gethostname())
    return hosts


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """Ranks that share rows, clearly slower than others with the same layers."""

    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    ratio: float  # of their time to the middle one of the others

    def __str__(self) -> str:
        return (f"slowest {numbers(list(self.ranks))} ({', '.join(self.hosts)}): "
                f"{self.ratio:.1f}x the others' forward")


class Stragglers:
    """The latest steps of every rank, and who among them is slow."""

    def __init__(self, layout: Layout, hosts: list[str]):
        self.hosts = hosts
        self.stages = [
            [
                [layout.rank(Coordinates(tp=tp, cp=cp, dp=dp, pp=pp))
                 for cp in range(layout.cp) for tp in range(layout.tp)]
                for dp in range(layout.dp)
            ]
            for pp in range(layout.pp)
        ]
        self.latest: deque[list[float]] = deque(maxlen=WINDOW)  # seconds of each rank
        self.step_seconds: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: list[float], step_seconds: float) -> None:
        """A step's forward seconds of each rank, and how long all of the step was."""
        self.latest.append(seconds)
        self.step_seconds.append(step_seconds)

    def typical(self) -> list[float]:
        """Seconds of each rank in a middling step of the latest."""
        return [median(times) for times in zip(*self.latest, strict=True)]

    def slowest(self) -> Straggler | None:
        """Who is slower than SLOWER times its like, by MATTERS of a step; of several the worst."""
        if len(self.latest) < FEWEST:
            return None
        times, found = self.typical(), []
        for replicas in self.stages:
            theirs = [max(times[rank] for rank in group) for group in replicas]
            for number, group in enumerate(replicas):
                others = theirs[:number] + theirs[number + 1 :]
                usual = median(others) if others else 0.0
                if not usual or theirs[number] < SLOWER * usual:
                    continue
                if theirs[number] - usual < MATTERS * median(self.step_seconds):
                    continue
                hosts = tuple(dict.fromkeys(self.hosts[rank] for rank in group))
                found.append(Straggler(
                    ranks=tuple(group), hosts=hosts, ratio=theirs[number] / usual
                ))
        return max(found, key=lambda one: one.ratio, default=None)
