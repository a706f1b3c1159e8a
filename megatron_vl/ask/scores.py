"""Scores of answers, as a table: by dataset, or by the groups that entries name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.ask.metrics import METRICS, answer_in
from megatron_vl.ask.record import Answered

ALL = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Of one dataset or group."""

    name: str
    count: int
    mean: float  # of the metric
    commonest: str  # expected answer
    of_commonest: float  # mean score of always giving it


def scores(answered: Sequence[Answered], metric: str, *, by_group: bool) -> list[Score]:
    """In order of their names; of several datasets the last is of them all."""
    members: dict[str, list[Answered]] = {}
    for one in answered:
        if one.refused is None:
            for name in one.groups if by_group else (one.dataset,):
                members.setdefault(name, []).append(one)
    if not by_group and len(members) > 1:
        members[ALL] = [one for ones in members.values() for one in ones]
    names = sorted(members, key=lambda name: (name == ALL and not by_group, name))
    return [_score(name, members[name], metric) for name in names]


def _score(name: str, answered: Sequence[Answered], metric: str) -> Score:
    expected = Counter(answer_in(one.expected) for one in answered)
    commonest = expected.most_common(1)[0][0]
    always = sum(METRICS[metric](commonest, text) * count for text, count in expected.items())
    return Score(
        name=name, count=len(answered), commonest=commonest, of_commonest=always / len(answered),
        mean=sum(one.score for one in answered) / len(answered),
    )


def as_text(found: Sequence[Score], metric: str) -> str:
    """A table; beside each score that of always giving the commonest answer."""
    word, last = "right" if metric == "exact" else metric, "always the commonest answer"
    width = max([len("questions"), *(len(one.name) for one in found)])
    lines = [f"{'questions':<{width}} {'number':>8} {word:>8} {last:>28}"]
    for one in found:
        answer = one.commonest if len(one.commonest) <= 30 else f"{one.commonest[:27]}..."
        always = f"{one.of_commonest:.3f} ({answer})"
        lines.append(f"{one.name:<{width}} {one.count:>8,} {one.mean:>8.3f} {always:>28}")
    return "\n".join(lines)


def refusals(answered: Sequence[Answered]) -> list[str]:
    """One line a reason for which questions were not asked, and one of answers cut off."""
    reasons = Counter(one.refused for one in answered if one.refused is not None)
    lines = []
    for reason, count in reasons.most_common():
        first = next(one for one in answered if one.refused == reason)
        lines.append(f"not asked: {count:,} ({reason}), such as {first.sample} of "
                     f"{first.dataset}: {first.message}")
    if cut := sum(not one.is_whole for one in answered if one.refused is None):
        lines.append(f"cut off after --max-new-tokens: {cut:,} answers")
    return lines
