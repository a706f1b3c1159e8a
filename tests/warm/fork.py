"""Forking a process that becomes the child of whoever asked for it, not of who forked it.

Its parent then waits for it, signals it and is followed by it in death as if it had started it: the
program under test notices no difference. Linux on x86-64 only, and without a GPU, whose driver does
not outlive a fork; elsewhere nothing is warm.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys

from megatron_vl.launch.devices import DRIVERS

_SYS_CLONE = 56
_PR_GET_TID_ADDRESS = 40
_CLONE_PARENT, _CLONE_CHILD_SETTID, _CLONE_CHILD_CLEARTID = 0x8000, 0x1000000, 0x200000

_libc = ctypes.PyDLL(None, use_errno=True) if sys.platform == "linux" else None


def possible() -> bool:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    if any(map(os.path.exists, DRIVERS)):
        return False
    return _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(ctypes.c_void_p())) == 0


def fork_sibling() -> int:
    """As os.fork, but the new process has this one's parent.

    Not to be called where there is more than one thread: only what Python itself does around a fork
    is done, and where the C library remembers its thread's number, as its own fork does it.
    """
    where = ctypes.c_void_p()
    assert _libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(where)) == 0
    flags = _CLONE_PARENT | _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID | signal.SIGCHLD
    nothing = ctypes.c_long(0)
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _libc.syscall(
        ctypes.c_long(_SYS_CLONE), ctypes.c_long(flags), nothing, nothing, where, nothing
    )
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone")
    return pid


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def show_as(words: list[str], environment: dict[str, str]) -> None:
    """Let /proc show this process's words and variables, as far as what it was started with left
    room for them: see `room`."""
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    # Counted from 1 in proc(5), and two of them stand before the parenthesis.
    arguments, end, variables, last = (int(fields[number - 3]) for number in (48, 49, 50, 51))
    for first, behind, texts in (
        (arguments, end, words),
        (variables, last, [f"{name}={value}" for name, value in environment.items()]),
    ):
        content = b"".join(os.fsencode(text) + b"\0" for text in texts)[: behind - first - 1]
        ctypes.memmove(first, content.ljust(behind - first, b"\0"), behind - first)


def room() -> tuple[list[str], dict[str, str]]:
    """Words and variables that take as much room as those of a process forked later may."""
    return ["." * 4096], {"WARM_ROOM": "." * 32768}
