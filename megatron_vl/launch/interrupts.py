"""Ctrl-C while the program is being imported.

Libraries try imports, and take a KeyboardInterrupt for one that failed: it would be lost, or end in
a traceback of theirs.
"""

from __future__ import annotations

import os
import signal

_ours: list[object] = []  # the handler that `leave_at_once` has set


def leave_at_once(command: str) -> None:
    """Let Ctrl-C end the process by one line, until `heed`; where it is ignored, it stays so."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    said = f"megatron-vl {command}: interrupted\n".encode()

    def leave(*_) -> None:
        os.write(2, said)
        os._exit(130)

    _ours[:] = [leave]
    signal.signal(signal.SIGINT, leave)


def heed() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: there are things to tidy up from now on."""
    if _ours and signal.getsignal(signal.SIGINT) is _ours[0]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
