"""What a validation found, as it is told, written and shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_vl.data.encode.previews import Preview


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Of one dataset, or of all."""

    loss: float
    token_accuracy: float  # share of supervised tokens that are the likeliest
    exact_accuracy: float  # share of samples all of whose answers' tokens are
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model says to a sample that is shown, by its likeliest tokens."""

    preview: Preview
    expected: str
    answer: str
    exact: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Alike on every rank but for `skipped` and `answers`."""

    figures: Figures
    datasets: dict[str, Figures] = field(default_factory=dict)  # by name, where there are several
    answers: list[Answer] = field(default_factory=list)  # on rank 0
    trained: int  # tokens that the loss is the mean over
    seconds: float
    # By reason. A reader reads the integers of the whole split, but only its own rows' pixels.
    skipped: dict[str, int] = field(default_factory=dict)
    cut: tuple[int, int] = (0, 0)  # long samples that were truncated, and tokens of them
