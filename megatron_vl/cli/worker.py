"""One rank of a training job: runs it, and when it fails, says why before the job goes down.

A rank that dies makes its neighbours fail too, with errors about closed connections. Only the rank
that fails first may speak: it claims FAILURE_FILE, which the launcher made a name for, and the
launcher takes the job's exit code from it.
"""

from __future__ import annotations

import os
import sys
import traceback

from megatron_vl.errors import InputError

FAILURE_FILE = "MEGATRON_VL_FAILURE_FILE"


def run_worker(config, *, debug: bool) -> None:
    """Train as the rank that the environment names; ends the process."""
    code = 0
    try:
        from megatron_vl.training.loop import train
        from megatron_vl.training.plan import plan_run

        train(plan_run(config, int(os.environ["WORLD_SIZE"])))
    except InputError as error:
        code = fail(2, traceback.format_exc() if debug else f"megatron-vl train: {error}")
    except BaseException as error:
        code = fail(1, traceback.format_exc() if _is_ours(error) or debug else repr(error))
    sys.stdout.flush()
    sys.stderr.flush()
    # Leave at once: destructors of process groups may wait for ranks that are gone.
    os._exit(code)


def _is_ours(error: BaseException) -> bool:
    return not isinstance(error, (KeyboardInterrupt, SystemExit))


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
