"""Notices a run that no longer gets on, writes where every rank stands, and ends it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import psutil
import torch

from megatron_vl.platform import barrier

_LOOK_SECONDS = 0.2
_LEAST_MARGIN, _MOST_MARGIN = 3.0, 60.0  # seconds for the others' stacks before the job ends


class HangWatch:
    """Watches that `beat` is called at least every `seconds`; all ranks create it together.

    The stacks are written by a thread of the interpreter's own, which needs no lock of Python's:
    also where a rank is stuck in a call that never lets go of it. A rank that was stopped from
    outside is woken for it by the others of its machine. SIGUSR2 writes a rank's stacks at any
    time.

    Args:
        seconds: without progress; 0 never watches.
        folder: gets `rank00000.txt` of every rank; what lies there of an earlier start that hung
            is moved to a folder of its own in it.
        give_up: ends this process with a message.
    """

    def __init__(self, seconds: float, folder: Path, give_up: Callable[[str], None]):
        self.seconds, self.folder, self._give_up = seconds, folder, give_up
        self.file = None
        self._last, self._longest, self._doing = time.monotonic(), 0.0, "starting"
        self._closed = threading.Event()
        if not seconds:
            return
        rank = torch.distributed.get_rank()
        if rank == 0:
            _set_aside(folder)
        here = (socket.gethostname(), os.getpid())
        everyone: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, here)
        self._neighbours = [pid for host, pid in everyone if host == here[0] and pid != here[1]]
        folder.mkdir(parents=True, exist_ok=True)  # nodes may not share it
        self.path = folder / f"rank{rank:05d}.txt"
        self.file = self.path.open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=self.file, all_threads=True)
        self.beat("starting")
        threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    def beat(self, doing: str | None = None) -> None:
        """This rank gets on; `doing` is what it does next, if that is something else."""
        if self.file is None:
            return
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last, self._doing = now, doing or self._doing
        faulthandler.dump_traceback_later(self.seconds, file=self.file)

    def close(self) -> None:
        if self.file is None:
            return
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        self.file.close()
        self.file = None
        _delete_if_empty(self.path)
        barrier()
        if torch.distributed.get_rank() == 0:
            _delete_if_empty(self.folder)

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            quiet = time.monotonic() - self._last
            if quiet > self.seconds:
                break
        else:
            return
        for one in psutil.Process().children(recursive=True):
            _wake(one)
        for pid in self._neighbours:
            if psutil.pid_exists(pid):
                neighbour = psutil.Process(pid)
                for one in (neighbour, *neighbour.children(recursive=True)):
                    _wake(one)
        # The others came a little further; theirs are on the way.
        time.sleep(min(_MOST_MARGIN, max(_LEAST_MARGIN, 2 * self._longest)))
        if self._closed.is_set():
            return
        if time.monotonic() - self._last <= self.seconds:  # it got on after all
            threading.Thread(target=self._watch, name="hang watch", daemon=True).start()
            return
        self._give_up(
            f"no progress for {time.monotonic() - self._last:.0f} s (hang-timeout {self.seconds:g} "
            f"s) while {self._doing}; where every rank stood is in {self.folder}. Raise "
            f"hang-timeout if it was only slow."
        )


def _delete_if_empty(path: Path) -> None:
    """A file or a folder; another run whose metrics lie beside this one's may have done it."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.stat().st_size == 0:
            path.unlink()


def _set_aside(folder: Path) -> None:
    """The stacks of a start before this one are what tells why it hung."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank*.txt"):
        written = old.stat()
        if written.st_size:
            when = datetime.fromtimestamp(written.st_mtime)
            kept = folder / f"{when:%Y-%m-%d-%H%M}"
            kept.mkdir(exist_ok=True)
            old.rename(kept / old.name)
        else:
            old.unlink()


def _wake(process: psutil.Process) -> None:
    """Let a rank or a process it forked go on, if it was stopped, and write its stacks."""
    try:
        process.send_signal(signal.SIGCONT)
        if _takes(process.pid, signal.SIGUSR2):
            process.send_signal(signal.SIGUSR2)
    except psutil.NoSuchProcess:
        pass


def _takes(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; one without, as a compiler, would be ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:  # it has ended, or this is no Linux
        return False
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)
