"""One rank of a training job: runs it, and when it fails, says why before the job goes down.

A rank that dies makes its neighbours fail too, with errors about closed connections. Only the rank
that fails first may speak: it claims FAILURE_FILE, which the launcher made a name for, and the
launcher takes the job's exit code from it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from megatron_vl.errors import InputError
from megatron_vl.platform import select_platform

FAILURE_FILE = "MEGATRON_VL_FAILURE_FILE"


def run_worker(work: Callable[[], None], *, command: str, debug: bool) -> NoReturn:
    """Do `work` as the rank that the environment names, and end the process."""
    code = 0
    try:
        _quiet_libraries()
        # Before Megatron-Core is imported by anything else: see the CPU platform.
        select_platform().install()
        work()
    except InputError as error:
        message = traceback.format_exc() if debug else f"megatron-vl {command}: {error}"
        code = fail(2, message)
    except BaseException:
        code = fail(1, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.terminate()
    # Leave at once: destructors of process groups may wait for ranks that are gone.
    os._exit(code)


def _quiet_libraries() -> None:
    """Hide what torch and Megatron-Core tell each other about their next versions."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|megatron\.core")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")


def fail(code: int, message: str) -> int:
    """Report a failure if this rank is the first to; returns its exit code."""
    path = os.environ.get(FAILURE_FILE)
    if path is not None:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return code  # another rank failed before and has said why
        os.write(handle, str(code).encode())
        os.close(handle)
    where = "" if code == 2 else f"rank {os.environ['RANK']} failed:\n"
    print(where + message.rstrip(), file=sys.stderr, flush=True)
    return code
