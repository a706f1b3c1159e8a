"""A dialogue in a terminal, or with the lines of a file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import closing

from megatron_vl.ask.dialogue import Dialogue
from megatron_vl.errors import InputError, printable
from megatron_vl.models.media import MEDIA_KINDS

HELP = """\
/image PATH   show an image with the next question; again for several
/video PATH   show a video with it
/reset        forget the conversation
/exit         leave; so do Ctrl-D and Ctrl-C, which first ends an answer
/help         this
"""


def say_answer(dialogue: Dialogue, question: str) -> None:
    """Print the answer while it is made. Ctrl-C ends it, and raises KeyboardInterrupt.

    Raises:
        InputError: see `Dialogue.ask`.
    """
    try:
        with closing(dialogue.ask(question)) as answer:
            for piece in answer:
                print(printable(piece), end="", flush=True)
    finally:
        print(flush=True)
    if not dialogue.is_whole:
        _tell(f"cut off after --max-new-tokens {dialogue.sampling.max_new_tokens}")


def talk(dialogue: Dialogue) -> None:
    """Every line of the standard input as a question or a command, until it ends.

    In a terminal what cannot be used is told and the dialogue goes on.

    Raises:
        InputError: a line that cannot be used, where there is no terminal.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _tell("ask; /help lists what else can be typed")
    for line in _lines(is_terminal):
        try:
            if _is_last(dialogue, line):
                return
        except InputError as error:
            if not is_terminal:
                raise
            _tell(str(error))
        except KeyboardInterrupt:  # in an answer
            if not is_terminal:
                raise


def _lines(is_terminal: bool) -> Iterator[str]:
    if not is_terminal:
        yield from sys.stdin
        return
    import readline  # noqa: F401  (input() then edits lines, and remembers them)

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _is_last(dialogue: Dialogue, line: str) -> bool:
    """Does what a line asks; whether it is to leave.

    Raises:
        InputError: it cannot be used.
    """
    line = line.strip()
    if not line.startswith("/"):
        if line:
            say_answer(dialogue, line)
        return False
    command, _, rest = line[1:].partition(" ")
    if command in MEDIA_KINDS:
        dialogue.show(command, _path(command, rest))
    elif command == "reset":
        dialogue.reset()
    elif command == "help":
        _tell(HELP.rstrip())
    elif command != "exit":
        raise InputError(f"/{command} is no command; /help lists them.")
    return command == "exit"


def _path(command: str, text: str) -> str:
    """One path, with or without quotes, as a shell or a terminal's drag and drop writes it."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = [text]
    if len(words) != 1:
        raise InputError(f"/{command} {text} names {len(words)} files; give one, in quotes if its "
                         f"name has blanks.")
    return words[0]


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
