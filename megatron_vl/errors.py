"""The one error a person's input raises: a sentence that says what is wrong, where, the mend; and
the bounds of numbers, which most of it is about."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

_STEERS = ("Cc", "Cf", "Cs", "Zl", "Zp")
_KEPT = "\n\t\u200c\u200d"  # the last two join and part letters in several scripts


class InputError(ValueError):
    """Unusable arguments or input.

    The message is one sentence a user can act on: what is wrong, where (file, key, sample or
    argument), how to mend it. The command line prints it without a traceback and exits with 2.
    Names in it may be another's, of a tar's member or a key of a file: none of them steers the
    terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class CheckFailed(Exception):
    """A check that ran to its end and found a difference; the command line exits with 1."""


def printable(text: str) -> str:
    """A text without what steers a terminal or turns the direction of a line: it is shown instead,
    as \\x1b is."""
    return "".join(
        one if one in _KEPT or unicodedata.category(one) not in _STEERS else
        one.encode("unicode_escape").decode("ascii")
        for one in text
    )


def shown(text: object, most: int = 80) -> str:
    """A text for a message, its middle left out where it is long."""
    text = str(text)
    return text if len(text) <= most else f"{text[: most - 20]}...{text[-17:]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Between which numbers an option, an argument or a variable may be."""

    least: float | None = None
    above: float | None = None  # instead of `least`
    most: float | None = None
    below: float | None = None  # instead of `most`

    def check(self, name: str, value: float) -> None:
        """Raises InputError: `value` is out of bounds, or NaN."""
        low = value >= self.least if self.above is None else value > self.above
        high = value <= self.most if self.below is None else value < self.below
        if not (low and high):
            raise InputError(f"{name} is {shown(value)}; it must be {self}.")

    def __str__(self) -> str:
        low = f"at least {self.least}" if self.above is None else f"above {self.above}"
        return low + (f" and at most {self.most}" if self.below is None else
                      f" and less than {self.below}")


def check_bounds(values: object, bounds: Mapping[str, Bounds]) -> None:
    """Whether the attributes that `bounds` names are within them; None passes, as unset.

    Raises:
        InputError: one is not, or one of several that it holds.
    """
    for name, bound in bounds.items():
        value = getattr(values, name, None)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                bound.check(name.replace("_", "-"), one)
