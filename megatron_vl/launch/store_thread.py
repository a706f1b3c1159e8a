"""Calls of node 0's store in threads, for they may wait for its answer as long as they like.

torch bounds only some of them: where node 0 is gone without a word, the others wait until the
kernel gives up, a quarter of an hour or more.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import NoReturn


class StoreThread(threading.Thread):
    """Nothing waits for it at the end of the process, if that is left by `leave`."""

    def __init__(self, **options):
        super().__init__(daemon=True, **options)


def leave(code: int) -> NoReturn:
    """`sys.exit`, or at once while a call is unanswered.

    Were it answered while Python ends, its thread could not come back from torch's C++, which would
    abort the process.
    """
    if any(isinstance(thread, StoreThread) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
