"""The one error a person's input raises: a sentence that says what is wrong, where, the mend."""

import unicodedata

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
