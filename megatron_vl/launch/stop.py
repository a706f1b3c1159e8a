"""Being asked to stop: a run that is told so in time saves, and ends as if it were done."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of schedulers that will end a job soon
AGAIN = "stop-now"
_PATIENCE = 1.0  # seconds in which the launcher says that it was asked as well


class StopRequest:
    """Whether this rank was asked to save and stop.

    A rank is asked by its launcher, through a file, or by a signal of its own: some schedulers
    signal every process of a job. But a launcher also ends its ranks by SIGTERM, when one of them
    has failed: then there is nothing to save any more, and a rank leaves at once.

    Args:
        file: what the launcher makes when it is asked, and `AGAIN` beside it when it is asked once
            more; None if another one started this rank.
    """

    def __init__(self, file: Path | None = None):
        self._file = file
        self._reason = ""
        self._since = 0.0  # when it was heard of, by time.monotonic

    @property
    def reason(self) -> str:
        """The signal's name; empty as long as nobody asked."""
        if not self._reason and self._file is not None and self._file.is_file():
            self._since = time.monotonic()
            self._reason = self._file.read_text(encoding="utf-8") or "the launcher"
        return self._reason

    def listen(self) -> None:
        """Take signals from now on, in a thread of their own: the main thread may be waiting for
        another rank inside a call that only returns when that one has answered.

        To be called by the main thread before there are others: they inherit what it blocks, as do
        the processes it forks, which go on with their work and end with this one.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._take, name="signals", daemon=True).start()

    def _take(self) -> None:
        signalled = False
        while True:
            taken = signal.Signals(signal.sigwait(SIGNALS))
            # One request to all processes comes twice: from the launcher, and by this signal.
            late = bool(self._reason) and time.monotonic() > self._since + _PATIENCE
            again = signalled or late or self._asked_again()
            if taken == signal.SIGTERM and (again or not self._asked_as_well()):
                os._exit(128 + taken)
            signalled = True
            if not self._reason:
                self._since, self._reason = time.monotonic(), taken.name

    def _asked_again(self) -> bool:
        return self._file is not None and self._file.with_name(AGAIN).exists()

    def _asked_as_well(self) -> bool:
        """Whether the launcher was asked too, or there is none of ours."""
        deadline = time.monotonic() + _PATIENCE
        while self._file is not None and not self._file.is_file():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True
