"""Forks processes in which all that ranks import is there already: started once a test process.

    python nursery.py FD

reads requests from the socket FD, and becomes the child of whoever asks. A request says what
`python` would have been started with. Nothing but imports has happened in this process: it has one
thread, and has opened no parallel region and no device.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import json
import os
import pkgutil
import random
import runpy
import signal
import socket
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

WARM = str(Path(__file__).resolve().parent)
ROOT = str(Path(__file__).resolve().parents[2])
# A program's own path without what PYTHONPATH and its place add: what the interpreter gave us.
PATH = [one for one in sys.path[1:] if one != ROOT]
sys.path[:] = [ROOT, str(Path(WARM).parent), *PATH]

from warm import start  # noqa: E402
from warm.fork import fork_sibling, show_as, threads  # noqa: E402

# What the package's modules import only when they are used.
LATER = (
    "megatron.core.dist_checkpointing",
    "megatron.core.optimizer.cpu_offloading",
    "megatron.energon",
    "torch.distributed.checkpoint",
    "torch.distributed.elastic.rendezvous.static_tcp_rendezvous",
    "torch.distributed.launcher.api",
    "torch.distributed.run",
    "torch.utils.data",
    "torch.utils.tensorboard",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.auto.modeling_auto",
    "matplotlib.pyplot",
)
# Libraries that a backend may find.
ABSENT = ("transformer_engine", "flash_attn", "triton", "torch_npu")


def import_all() -> None:
    from megatron_vl.platform.stand_in import import_megatron_core

    # As a rank does it, before anything else imports Megatron-Core; but nothing is installed.
    import_megatron_core()
    import megatron_vl

    for module in pkgutil.walk_packages(megatron_vl.__path__, "megatron_vl."):
        if module.name != "megatron_vl.__main__":
            with_its_library(module.name)
    for name in LATER:
        with_its_library(name)


def with_its_library(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ABSENT:
            raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a process is to be."""

    words: list[str]  # behind the interpreter and its option -u
    unbuffered: bool
    environment: dict[str, str]
    directory: str
    group: int | None  # process group to join; 0: one of its own; None: a session of its own

    def become(self, streams: list[int]) -> None:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        if self.group is None:
            os.setsid()
        else:
            os.setpgid(0, self.group)
        for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(one, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        show_as([sys.executable, *self.words], self.environment)
        if self.unbuffered:
            sys.stdout = io.TextIOWrapper(
                io.FileIO(1, "w", closefd=False), encoding=sys.stdout.encoding, write_through=True
            )
        random.seed()
        sys.modules["numpy"].random.seed()

    def run(self) -> None:
        """The program, as `python WORDS` runs it and ends."""
        code = 0
        try:
            self._run()
        except SystemExit as end:
            code = end.code
            if code is not None and not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        leave(code or 0)

    def _run(self) -> None:
        of_environment = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
        sys.path[:] = ["", *of_environment, *PATH]
        if self.words[0] == "-m":
            sys.path[0] = os.getcwd()
            sys.argv[:] = self.words[1:]
            runpy.run_module(self.words[1], run_name="__main__", alter_sys=True)
            return
        script = Path(self.words[0])
        sys.path[0] = str(script.resolve().parent)
        sys.argv[:] = self.words
        main = types.ModuleType("__main__")
        main.__file__ = str(script)
        sys.modules["__main__"] = main
        exec(compile(script.read_bytes(), str(script), "exec"), main.__dict__)


def leave(code: int) -> NoReturn:
    """End as the interpreter does, but for taking every module apart, which takes it longer than
    most of the tests' programs take."""
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 120  # as the interpreter's
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def serve(asked: socket.socket) -> tuple[Request, list[int]]:
    """Fork a process for every request, and return only in such a process."""
    while True:
        message, streams, *_ = socket.recv_fds(asked, start.LONGEST, 3)
        if not message:
            os._exit(0)  # nobody is left to ask
        if threads() > 1:
            asked.send(b"a process with threads must not fork")
            os._exit(1)
        pid = fork_sibling()
        if pid == 0:
            asked.close()
            return Request(**json.loads(message)), streams
        for stream in streams:
            os.close(stream)
        asked.send(str(pid).encode())


def wait_for_requests(asked: socket.socket) -> Request:
    """As `serve`; the process has a nursery of its own, for the ranks that it may start."""
    while True:
        request, streams = serve(asked)
        request.become(streams)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            theirs.close()
            start.use(start.Nursery(ours))
            return request
        ours.close()
        asked = withdraw(theirs)


def withdraw(asked: socket.socket) -> socket.socket:
    """A nursery holds no pipe open, takes no signal of those it serves, and has its own name."""
    os.setpgid(0, 0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    os.close(nowhere)
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    os.environ.clear()  # the C library's too, which lies where the names are shown
    show_as(["nursery"], {})
    return asked


if __name__ == "__main__":
    import_all()
    gc.collect()
    gc.freeze()  # what is shared stays shared
    wait_for_requests(withdraw(socket.socket(fileno=int(sys.argv[1])))).run()
