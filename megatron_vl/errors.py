"""The one error a person's input raises: a sentence that says what is wrong, where, the mend."""

import re
import unicodedata

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
    argument), how to mend it. The command line prints it without a traceback and exits with 2.
    Names in it may be another's, of a tar's member or a key of a file: none of them steers the
    terminal, and none fills it: see `shortened`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(printable(message)))


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


def printable(text: str) -> str:
    """A text without what steers a terminal or turns the direction of a line: it is shown instead,
    as \\x1b is."""
    return "".join(
        one if one in _KEPT or unicodedata.category(one) not in _STEERS else
        one.encode("unicode_escape").decode("ascii")
        for one in text
    )
