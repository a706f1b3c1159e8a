"""One run at a time writes to a SAVE: two would take each other's checkpoints for their own."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from megatron_vl.errors import InputError

LOCK = ".lock"
_HERE_SECONDS = 10.0  # that a process of this machine may take to end
_ELSEWHERE_SECONDS = 100.0  # after which a network file system lets go of what a dead machine held
_LOOK_SECONDS = 0.2
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def hold(root: Path) -> IO[str] | None:
    """Lock SAVE for this process, until it ends, however it does; the processes it forks do not
    hold it. None where the file system has no locks.

    Returns:
        the file, which must stay open.

    Raises:
        InputError: another run holds it, or the file system fails.
    """
    root.mkdir(parents=True, exist_ok=True)
    file = _locked(root)
    if file is not None:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


def check_free(root: Path) -> None:
    """Raises InputError: another run holds SAVE's lock. Leaves it, and SAVE, as they are."""
    if os.access(root / LOCK, os.W_OK) and (file := _locked(root)) is not None:
        file.close()


def _locked(root: Path) -> IO[str] | None:
    begun = time.monotonic()
    try:
        file = (root / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise _failed(root, error) from error
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if error.errno not in _HELD:
                file.close()
                if error.errno in _NO_LOCKS:
                    return None
                raise _failed(root, error) from error
        file.seek(0)
        holder, _, host = file.read().strip().partition(" on ")
        patience = _HERE_SECONDS if host == socket.gethostname() else _ELSEWHERE_SECONDS
        if time.monotonic() > begun + patience:
            file.close()
            raise InputError(
                f"{root} is being written by another run, process {holder or '?'} on "
                f"{host or 'an unknown host'}; end that one, or give another --save."
            )
        time.sleep(_LOOK_SECONDS)


def _failed(root: Path, error: OSError) -> InputError:
    return InputError(
        f"{root / LOCK}, by which a run keeps others out, cannot be locked ({error.strerror}); see "
        f"whether its file system is there and writable, or give another --save."
    )
