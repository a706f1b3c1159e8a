"""What a replay found, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vl.training.replay.probe import NotFinite


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample of a row."""

    name: str  # as of `sample_name`
    loss: float = 0.0  # the mean over its trained tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A microbatch: a row, or `micro_batch_size` of them."""

    replica: int  # data-parallel rank of the run
    number: int  # from 0, among those of that rank in the step
    loss: float  # the mean over its trained tokens, or over its samples, as the run's loss is
    samples: Sequence[Sample]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """A step."""

    loss: float
    grad_norm: float | None  # None where fp16's loss scale was too large
    fault: str  # what the run's guard says of it; empty: nothing
    rows: Sequence[Row]  # those that are reported
    layers: Mapping[str, float]  # gradient norm of each, and of modules beside them
    largest: Mapping[str, float]  # finite output of each module
    not_finite: tuple[NotFinite, tuple[int, int]] | None  # the first, and its row's place
    left_out: Sequence[str]  # samples, each with the reason

    @property
    def worst(self) -> list[Sample]:
        """Samples whose loss is not finite, then those of the highest."""
        samples = [sample for row in self.rows for sample in row.samples]
        return sorted(samples, key=lambda one: badness(one.loss), reverse=True)


def badness(number: float) -> float:
    """What sorts numbers that are not finite behind all others."""
    return number if math.isfinite(number) else math.inf
