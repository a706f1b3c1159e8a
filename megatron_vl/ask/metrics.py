"""How right an answer is, from 0 to 1, beside the expected one."""

from __future__ import annotations

from collections.abc import Callable

THOUGHT = "</think>"  # behind it an answer that was reasoned for begins
Metric = Callable[[str, str], float]  # of the given and the expected answer


def answer_in(text: str) -> str:
    """An answer without its reasoning and the blanks around it."""
    return text.rpartition(THOUGHT)[2].strip()


def exact(given: str, expected: str) -> float:
    """1 if they are the same to the letter."""
    return float(given == expected)


def contains(given: str, expected: str) -> float:
    """1 if the expected answer stands in the given one, in letters of either case."""
    return float(expected.casefold() in given.casefold())


def anls(given: str, expected: str) -> float:
    """Normalised Levenshtein similarity, of answers read from documents and scenes.

    Biten et al., Scene Text Visual Question Answering (2019), equation 1: 1 - NL, where NL is the
    edit distance over the longer length, and 0 from NL = 0.5 on; letters of either case.
    """
    one, other = given.casefold(), expected.casefold()
    longest = max(len(one), len(other))
    share = edit_distance(one, other) / longest if longest else 0.0
    return 1.0 - share if share < 0.5 else 0.0


def relaxed(given: str, expected: str) -> float:
    """1 if a number is within 5% of the expected one, or another answer is the same in letters of
    either case.

    Masry et al., ChartQA (2022), section 5.1; a percentage is its number over 100.
    """
    one, other = _number(given), _number(expected)
    if one is not None and other:
        return float(abs(one - other) <= 0.05 * abs(other))
    return float(given.casefold() == expected.casefold())


def edit_distance(one: str, other: str) -> int:
    """Letters to insert, delete or change (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, start=1):
        before, row[0] = row[0], number
        for at, letter_2 in enumerate(other, start=1):
            before, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1,
                                           before + (letter != letter_2))
    return row[-1]


def _number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


METRICS: dict[str, Metric] = {
    "exact": exact, "contains": contains, "anls": anls, "relaxed": relaxed,
}
