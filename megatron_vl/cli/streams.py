"""Output into a file on a disk that is full: lost, and counted, but not the end of a run."""

from __future__ import annotations

import errno
import sys
from typing import TextIO

_FULL = (errno.ENOSPC, errno.EDQUOT)


def outlast_full_disks() -> None:
    """Let what this process prints fail with no more than a line about it, once there is room."""
    sys.stdout, sys.stderr = _Patient(sys.stdout), _Patient(sys.stderr)


class _Patient:
    """A text stream that does not raise when the disk behind it is full."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._lost = 0  # lines

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._lost and self.flush():
            lost, self._lost = self._lost, 0
            self.write(f"[the disk was full: up to {lost} lines are missing here]\n")
        try:
            self._stream.write(text)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._lost += text.count("\n")
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> bool:
        """Whether all is written."""
        try:
            self._stream.flush()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._lost = max(1, self._lost)  # what waits in a buffer may be overrun
            return False
        return True
