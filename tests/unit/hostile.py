"""What the tests of hostile files share: a payload that shows when it ran, and its refusal."""

from __future__ import annotations

from pathlib import Path

from megatron_vl.cli.main import run

DEEP = "[" * 200_000


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refusal(capsys, *words: object) -> str:
    """The one sentence of a command that is refused."""
    assert run([str(word) for word in words]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "Traceback" not in err
    return err
