"""How far one computation of a case is from another.

Letters: L tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

WORST = 5  # parameters that are named
COPY = " (copy "  # in the name of a gradient that several ranks have, all but the first one's


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one side computed for one case."""

    logits: list[torch.Tensor]  # per sample [L, V]
    loss: float
    gradients: dict[str, torch.Tensor]  # under Hugging Face names; ours may have copies


@dataclass(frozen=True, order=True, slots=True)
class Apart:
    """The largest difference within a tensor, or within several: compared by the relative one."""

    relative: float  # over the largest absolute value of transformers'
    absolute: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How far one side is from transformers in fp32 on one case."""

    case: str
    logits: Apart
    loss: Apart
    gradients: dict[str, Apart]  # of every parameter, the furthest off first

    @property
    def gradient(self) -> Apart:
        """The largest absolute and the largest relative one, of any parameters."""
        return _largest(self.gradients.values())

    @property
    def worst(self) -> str:
        return next(iter(self.gradients))

    @property
    def largest(self) -> float:
        return max(one.relative for one in (self.logits, self.loss, self.gradient))


def compare(case: str, ours: Outcome, theirs: Outcome) -> Difference:
    """Differences and what they are to the size of things; anything not finite is infinite."""
    published = {name: name.partition(COPY)[0] for name in ours.gradients}
    assert set(published.values()) == set(theirs.gradients), (
        set(published.values()) ^ set(theirs.gradients)
    )
    # A key bias shifts every score of a query alike: its true gradient is zero and what is there is
    # rounding, so the scale of a tensor never counts as smaller than 1e-4 of the largest gradient.
    floor = 1e-4 * max(float(g.abs().max()) for g in theirs.gradients.values())
    gradients = {
        name: _apart(g, theirs.gradients[published[name]], floor)
        for name, g in ours.gradients.items()
    }
    return Difference(
        case=case,
        logits=_largest([_apart(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True)]),
        loss=_apart(*(torch.tensor(one.loss, dtype=torch.float64) for one in (ours, theirs))),
        gradients=dict(sorted(gradients.items(), key=lambda one: one[1], reverse=True)),
    )


def _largest(apart: Iterable[Apart]) -> Apart:
    apart = list(apart)
    return Apart(max(one.relative for one in apart), max(one.absolute for one in apart))


def _apart(a: torch.Tensor, b: torch.Tensor, floor: float = 0.0) -> Apart:
    """How far `a` is from `b`, in units of `b`'s largest value or of `floor` if that is larger.

    NaN would compare as neither larger nor smaller and slip through every maximum: it is infinite.
    So is any difference from what is zero everywhere.
    """
    absolute = float((a.double() - b.double()).abs().max())
    scale = max(float(b.double().abs().max()), floor)
    relative = absolute / scale if scale else math.inf if absolute else 0.0
    return Apart(*(x if math.isfinite(x) else math.inf for x in (relative, absolute)))


def worst_parameters(differences: Sequence[Difference]) -> list[tuple[str, Apart, str]]:
    """The parameters furthest off in any case: (name, how far, case), the furthest first."""
    found: dict[str, tuple[str, Apart, str]] = {}
    for one in differences:
        for name, apart in one.gradients.items():
            if name not in found or apart > found[name][1]:
                found[name] = (name, apart, one.case)
    return sorted(found.values(), key=lambda one: one[1], reverse=True)[:WORST]
