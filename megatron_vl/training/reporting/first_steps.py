"""The first steps of a start: what each stage took and held, beside what was predicted of it.

Here it is measured and told. What was predicted, and what would help, is the answer of a function
that whoever starts the run hands in: see `Compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from megatron_vl.errors import as_called
from megatron_vl.parallel import Layout
from megatron_vl.training.plan import Plan
from megatron_vl.training.reporting.metrics import StepMetrics
from megatron_vl.training.resilience.stragglers import Straggler

STEPS = 10  # of a start, after which it is told; the first warms up and is not counted
FEWEST = 3  # counted steps, of a run that ends before
GIB = 2**30
TOLD = 4  # stages that the line tells one by one


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A middling step of the first, of all ranks."""

    iteration: int  # the last of them
    device: str  # as its maker calls it
    step_seconds: float
    data_wait_seconds: float  # of the rank that waited longest
    forward: tuple[float, ...]  # seconds of a step, of each stage
    backward: tuple[float, ...]
    memory_bytes: tuple[int, ...] | None  # peak of each stage's fullest rank; None: not counted
    samples: float  # of a step, on average, as the next three
    tokens: float
    trained_tokens: float
    vision_flops: float
    llm_flops: float
    slowest: Straggler | None  # who is told of already

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds of a step that each stage computes."""
        return tuple(map(sum, zip(self.forward, self.backward, strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """What was predicted of the same steps, and what would help."""

    memory_bytes: tuple[int, ...]  # of a rank of each stage
    card: str | None = None  # whose rates the times are predicted with; None: of no known one
    step_seconds: float | None = None
    busy: tuple[float, ...] | None = None  # seconds of a step, of each stage
    advice: str = ""  # a sentence; empty where nothing helps enough


Compare = Callable[[Plan, Measured], Compared]


@dataclass(kw_only=True)
class FirstSteps:
    """Collects the steps of a start until there are enough; rank 0 makes one."""

    layout: Layout
    device: str
    counts_memory: bool  # whether the device knows what tensors take
    _steps: list[StepMetrics] = field(default_factory=list)
    _times: list[tuple[Sequence[float], Sequence[float]]] = field(default_factory=list)
    _over: bool = False

    def add(
        self, step: StepMetrics, *, forward: Sequence[float], backward: Sequence[float],
        memory: Sequence[float], last: bool = False,
    ) -> Measured | None:
        """What the steps so far come to, once.

        Args:
            forward: seconds of each rank in this step; `backward` the same.
            memory: peak bytes of each rank.
            last: the run ends with this step.
        """
        if self._over:
            return None
        self._steps.append(step)
        self._times.append((forward, backward))
        self._over = last or len(self._steps) == STEPS
        if not self._over or len(self._steps) <= FEWEST:
            return None
        steps = self._steps[1:]
        ranks = [[rank for rank in range(self.layout.world_size)
                  if self.layout.coordinates(rank).pp == stage] for stage in range(self.layout.pp)]
        times = [[median(one) for one in zip(*every, strict=True)]
                 for every in zip(*self._times[1:], strict=True)]
        forward, backward = (tuple(median(of[rank] for rank in stage) for stage in ranks)
                             for of in times)
        return Measured(
            iteration=step.iteration, device=self.device,
            step_seconds=median(one.step_seconds for one in steps),
            data_wait_seconds=median(one.data_wait_seconds for one in steps),
            forward=forward, backward=backward,
            memory_bytes=tuple(int(max(memory[rank] for rank in stage)) for stage in ranks)
            if self.counts_memory else None,
            **{name: mean(getattr(one, name) for one in steps) for name in (
                "samples", "tokens", "trained_tokens", "vision_flops", "llm_flops")},
            slowest=step.slowest,
        )


def told(measured: Measured, compared: Compared) -> str:
    """Prediction and fact in one line, and what would help."""
    seconds, busy = measured.step_seconds, measured.busy
    fullest = max(range(len(busy)), key=lambda stage: (measured.memory_bytes or
                                                       compared.memory_bytes)[stage])
    predicted = f"{compared.memory_bytes[fullest] / GIB:.2f} GiB"
    where = f" on stage {fullest}" if len(busy) > 1 else ""
    parts = [
        f"memory {predicted} predicted{where}; a CPU does not count what tensors take"
        if measured.memory_bytes is None else
        f"memory {measured.memory_bytes[fullest] / GIB:.2f} GiB{where}, {predicted} predicted",
        f"a step {seconds:.3g} s" + (
            "" if compared.step_seconds is None else
            f", {compared.step_seconds:.3g} s predicted for {compared.card}"),
        *_busy(busy, seconds),
    ]
    if waits := measured.data_wait_seconds / seconds:
        parts.append(f"waits for data {waits:.0%}")
    line = f"the first steps, to iteration {measured.iteration}: {'; '.join(parts)}"
    return as_called(f"{line}. {compared.advice}" if compared.advice else line)


def _busy(busy: Sequence[float], seconds: float) -> list[str]:
    if len(busy) == 1:
        return [f"computes {busy[0] / seconds:.0%} of it"]
    shares = [f"{one / seconds:.0%}" for one in busy]
    if len(busy) <= TOLD:
        return ["stages compute " + ", ".join(shares) + " of it"]
    most, least = (pick(range(len(busy)), key=lambda stage: busy[stage]) for pick in (max, min))
    return [f"stages compute from {shares[least]} (stage {least}) to {shares[most]} (stage {most}) "
            f"of it"]
