"""One rank of a training job: runs it, and when it fails, says why before the job goes down.

A rank that dies makes its neighbours fail too, with errors about closed connections. Only the rank
that fails first is heard: it claims FAILURE_FILE, which the launcher made a name for, and the
launcher prints the message it finds there and ends with its code. The launcher prints, for it
outlives the ranks: a rank may be ended by it between claiming the file and printing.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_vl.errors import FAILURE_FILE, InputError
from megatron_vl.launch.ascend import check_visible

# Files beside it: the launcher was asked to stop; the run has got past its first step.
STOP, STEPPED = "stop", "stepped"
# What a user can do nothing about, by the logger that says it: how it begins.
_NOTICES = {
    "megatron.core.distributed.distributed_data_parallel":
        "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # a CUDA build without a GPU
}


def beside_failure(name: str) -> Path | None:
    """A file that our launcher and its ranks both know; None if another launcher started us."""
    failure = os.environ.get(FAILURE_FILE)
    return None if failure is None else Path(failure).with_name(name)


def started_by_torchrun() -> bool:
    """Whether this process is a rank; a shell may have exported one of these by itself."""
    return all(name in os.environ for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))


def run_worker(work: Callable[[], None], *, command: str, debug: bool) -> NoReturn:
    """Do `work` as the rank that the environment names, and end the process."""
    from megatron_vl.platform import select_platform

    code = 0
    # Whatever a shell has set: no checkpoint's pickle is run.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        _quiet_libraries()
        _die_together()
        check_visible(os.environ)  # of ranks that another launcher started
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


def _die_together() -> None:
    """Let the processes this rank forks, its data workers, die when it does, even by SIGKILL; and
    the rank when our launcher does.

    A worker whose rank is gone would wait for ever to hand over its last rows, and keep the job's
    output open. A rank whose launcher is gone would train on beside those of the next start.
    """
    if sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def follow() -> None:
        parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        prctl(parent_death_signal, int(signal.SIGKILL))

    os.register_at_fork(after_in_child=follow)
    if FAILURE_FILE in os.environ:
        follow()


def _quiet_libraries() -> None:
    """Hide what torch and Megatron-Core tell each other about their next versions."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|megatron\.core")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    for name, beginning in _NOTICES.items():
        logging.getLogger(name).addFilter(
            lambda record, known=beginning: not record.getMessage().startswith(known))


def fail(code: int, message: str) -> int:
    """Report a failure if this rank is the first to; returns its exit code.

    Under our launcher the report goes into FAILURE_FILE; under another one it is printed.
    """
    where = "" if code == 2 else f"rank {os.environ['RANK']} failed:\n"
    report = where + message.rstrip() + "\n"
    path = os.environ.get(FAILURE_FILE)
    if path is None or not _claim(Path(path), f"{code}\n{report}"):
        print(report, end="", file=sys.stderr, flush=True)
    return code


def _claim(path: Path, content: str) -> bool:
    """Whether `path` now holds a rank's whole report, be it ours or an earlier one."""
    try:
        # Written aside and linked: whoever sees the file sees all of it.
        handle, private = tempfile.mkstemp(dir=path.parent)
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(content)
        os.link(private, path)
    except FileExistsError:
        pass  # another rank failed before; the launcher prints what that one said
    except OSError:
        return False  # no launcher is there any more, or its disk is full
    return True


def read_failure(path: Path) -> tuple[int, str] | None:
    """The exit code and report of the rank that failed first; None when none reported."""
    if not path.is_file():
        return None
    code, _, report = path.read_text(encoding="utf-8").partition("\n")
    return int(code), report
