"""The one error a person's input raises: a sentence that says what is wrong, where, the mend; and
the bounds of numbers, which most of it is about."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

OPTIONS = "MEGATRON_VL_"  # with an option's name behind it, a variable that gives it
# What a script that takes options as arguments of its own calls them, `seq-length=SEQ_LEN;..`.
CALLED = "MEGATRON_VL_CALLED"
FAILURE_FILE = "MEGATRON_VL_FAILURE_FILE"  # what the launcher tells its ranks
NO_OPTIONS = (CALLED, FAILURE_FILE)
# Options that are words of their own: only `--save` and `option save` name them.
_WORDS = ("load", "save", "report", "profile", "seed", "to", "from", "dtype", "overwrite",
          "deterministic")
_STEERS = ("Cc", "Cf", "Cs", "Zl", "Zp")
_KEPT = "\n\t\u200c\u200d"  # the last two join and part letters in several scripts
MAX_VALUE = 200  # characters of one value in a message
_MAX_MESSAGE = 2000  # characters
_LONG = re.compile(  # what stands between quotes, or between blanks
    rf"(?<!\w)'(?:[^'\\]|\\.){{{MAX_VALUE - 1},}}'(?!\w)"
    rf'|(?<!\w)"(?:[^"\\]|\\.){{{MAX_VALUE - 1},}}"(?!\w)'
    rf"|\S{{{MAX_VALUE + 1},}}",
    re.DOTALL,
)


class InputError(ValueError):
    """Unusable arguments or input.

    The message is one sentence a user can act on: what is wrong, where (file, key, sample or
    argument), how to mend it. It calls options by their flags; whoever gave one by another name
    reads that one (`as_called`). The command line prints it without a traceback and exits with 2.
    Names in it may be another's, of a tar's member or a key of a file: none of them steers the
    terminal, and none fills it: see `shortened`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(printable(as_called(message))))


class CheckFailed(Exception):
    """A check that ran to its end and found a difference; the command line exits with 1."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(printable(message)))


def shortened(message: str) -> str:
    """A message whose values are cut in their middle where they are longer than MAX_VALUE."""
    message = _LONG.sub(lambda found: _cut(found[0], MAX_VALUE), message)
    return message if len(message) <= _MAX_MESSAGE else _cut(message, _MAX_MESSAGE)


def shown(value: object) -> str:
    """A value that stands in a message without quotes and may have blanks, such as a path."""
    text = str(value)
    return text if len(text) <= MAX_VALUE else _cut(text, MAX_VALUE)


def _cut(text: str, length: int) -> str:
    left_out = f"...({len(text):,} characters)..."
    tail = length // 4
    return text[: length - len(left_out) - tail] + left_out + text[-tail:]


_typed: dict[str, str] = {}  # an option's name -> the flag of another name that was typed


def call_as_typed(flags: Mapping[str, str]) -> None:
    """What `as_called` is to call options that were typed by another name: `--tp`."""
    _typed.clear()
    _typed.update(flags)


def as_called(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """A text that calls options as they were given: by a flag of another name, by a script's
    arguments, which it lists in CALLED, or by their variables."""
    called = dict(one.strip().partition("=")[::2] for one in environ.get(CALLED, "").split(";"))
    names = _typed | called  # a script types flags of its own for its user's words
    names.pop("", None)
    typed = {word.partition("=")[0] for word in sys.argv}
    for variable in environ:
        flag = variable.removeprefix(OPTIONS).lower().replace("_", "-")
        if not variable.startswith(OPTIONS) or variable in NO_OPTIONS or not environ[variable]:
            continue
        if f"--{flag}" not in typed:
            names.setdefault(flag, variable)
    if not names:
        return text
    words = {re.escape(name): name for name in names.values()}  # such as stand there already
    for flag, name in names.items():
        # argparse calls an option by all its flags, `--tensor-model-parallel-size/--tp`.
        words[f"(?:--|option ){'' if flag.split()[0] in _WORDS else '?'}{re.escape(flag)}"
              r"(?:/--[\w-]+)*"] = name
    longest_first = sorted(words, key=len, reverse=True)
    found = re.compile(rf"(?<![\w./-])(?:{'|'.join(f'({one})' for one in longest_first)})"
                       r"(?![\w-]|[./]\w)")
    return found.sub(lambda match: words[longest_first[match.lastindex - 1]], text)


def printable(text: str) -> str:
    """A text without what steers a terminal or turns the direction of a line: it is shown instead,
    as \\x1b is."""
    return "".join(
        one if one in _KEPT or unicodedata.category(one) not in _STEERS else
        one.encode("unicode_escape").decode("ascii")
        for one in text
    )


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
