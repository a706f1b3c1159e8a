"""`subprocess.Popen` of this Python forks a warm process instead, where that makes no difference.

The process is a child of this one, with the pid, the signals, the streams and the exit code that
`Popen` knows of. What starts cold all the same:

- `python -c`, and any other option of the interpreter: those programs are about what is imported,
  or import little;
- a program with a `sitecustomize` of its own, which the interpreter runs before anything else;
- what asks `Popen` for more than streams, variables, a directory and a session.
"""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from warm.fork import possible, room

PYTHON = sys.executable  # a program may set it to another one
LONGEST = 150_000  # bytes of a request; a socket's message is at most some 200,000

_execute_child = subprocess.Popen._execute_child  # what we stand in for
_SIGNATURE = inspect.signature(_execute_child)
_STREAMS = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_PASSED_ON = {"self", "args", "cwd", "env", "start_new_session", *_STREAMS}
_OTHERWISE_COLD = {
    "executable": None, "preexec_fn": None, "close_fds": True, "pass_fds": (), "startupinfo": None,
    "creationflags": 0, "shell": False, "restore_signals": True, "gid": None, "gids": None,
    "uid": None, "umask": -1, "process_group": -1,
}


class Nursery:
    """The end of a socket at whose other end processes are forked.

    Args:
        end: of a socket to such a process; None: one is started when it is first needed, which
            takes it some seconds.
    """

    def __init__(self, end: socket.socket | None = None):
        self._end, self._one_at_a_time = end, threading.Lock()
        self._process: subprocess.Popen | None = None

    def start(self, message: bytes, streams: list[int]) -> int:
        """The pid of a new child of this process."""
        with self._one_at_a_time:
            if self._end is None:
                self._open()
            socket.send_fds(self._end, [message], streams)
            answer = self._end.recv(32)
        assert answer.isdigit(), answer.decode() or "the nursery is gone"
        return int(answer)

    def _open(self) -> None:
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words, variables = room()
        one_thread = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
        )
        program = Path(__file__).with_name("nursery.py")
        with theirs:
            self._process = subprocess.Popen(
                [PYTHON, program, str(theirs.fileno()), *words],
                env={**os.environ, **one_thread, **variables}, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )

    def close(self) -> None:
        if self._end is not None:
            self._end.close()
        if self._process is not None:
            self._process.wait(timeout=60)


_nursery: Nursery | None = None


def use(nursery: Nursery | None) -> None:
    """Start warm processes there from now on; None: start everything cold."""
    global _nursery
    _nursery = nursery if possible() else None
    subprocess.Popen._execute_child = _execute_child if _nursery is None else _start


def is_warm() -> bool:
    return _nursery is not None


def _start(popen: subprocess.Popen, *args, **kwargs) -> None:
    given = _SIGNATURE.bind(popen, *args, **kwargs).arguments
    message = _request(given)
    if message is None:
        return _execute_child(popen, *args, **kwargs)
    streams = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
    try:
        popen.pid = _nursery.start(
            message, [number if one == -1 else one for number, one in enumerate(streams)]
        )
        popen._child_created = True
    finally:
        popen._close_pipe_fds(*(given[name] for name in _STREAMS))
    return None


def _request(given: dict) -> bytes | None:
    """What the nursery is asked for; None where the process starts cold."""
    unusual = {name for name in set(given) - _PASSED_ON
               if name not in _OTHERWISE_COLD or given[name] != _OTHERWISE_COLD[name]}
    if unusual or isinstance(given["args"], (str, bytes, os.PathLike)):
        return None
    program, *words = map(os.fsdecode, given["args"])
    unbuffered = words[:1] == ["-u"]  # as torchrun starts its ranks
    words = words[unbuffered:]
    if program != PYTHON or not words or (words[0][0] == "-" and words[0] != "-m"):
        return None
    variables = os.environ if given["env"] is None else given["env"]
    variables = {os.fsdecode(name): os.fsdecode(value) for name, value in variables.items()}
    path = variables.get("PYTHONPATH", "").split(os.pathsep)
    if any(Path(one, "sitecustomize.py").exists() for one in path if one):
        return None
    message = json.dumps({
        "words": words, "environment": variables,
        "unbuffered": unbuffered or bool(variables.get("PYTHONUNBUFFERED")),
        "directory": os.path.abspath(os.fsdecode(given["cwd"] or ".")),
        "group": None if given["start_new_session"] else os.getpgrp(),
    }).encode()
    return message if len(message) <= LONGEST else None
