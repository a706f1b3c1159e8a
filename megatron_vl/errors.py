"""The one error a person's input raises: a sentence that says what is wrong, where, the mend."""

import os
import re
import sys
import unicodedata
from collections.abc import Mapping

OPTIONS = "MEGATRON_VL_"  # with an option's name behind it, a variable that gives it
# What a script that takes options as arguments of its own calls them, `seq-length=SEQ_LEN;..`.
CALLED = "MEGATRON_VL_CALLED"
FAILURE_FILE = "MEGATRON_VL_FAILURE_FILE"  # what the launcher tells its ranks
NO_OPTIONS = (CALLED, FAILURE_FILE)
# Options that are words of their own: only `--save` and `option save` name them.
_WORDS = ("load", "save", "report", "profile", "seed", "to", "from", "dtype", "overwrite")
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
        super().__init__(shortened(message))


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


def as_called(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """A text that calls options as they were given: by a script's arguments, which it lists in
    CALLED, or by their variables."""
    names = dict(one.strip().partition("=")[::2] for one in environ.get(CALLED, "").split(";"))
    names.pop("", None)
    typed = {word.partition("=")[0] for word in sys.argv}
    for variable in environ:
        flag = variable.removeprefix(OPTIONS).lower().replace("_", "-")
        if variable.startswith(OPTIONS) and variable not in NO_OPTIONS and f"--{flag}" not in typed:
            names.setdefault(flag, variable)
    if not names:
        return text
    words = {re.escape(name): name for name in names.values()}  # such as stand there already
    for flag, name in names.items():
        words[f"(?:--|option ){'' if flag.split()[0] in _WORDS else '?'}{re.escape(flag)}"] = name
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
