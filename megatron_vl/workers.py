"""Work shared out to processes that end with this one."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_vl.errors import InputError

_PR_SET_PDEATHSIG = 1  # prctl(2)

_job: tuple[Callable[[Any], Any], Sequence[Any]] | None = None  # as it was when a worker began


def in_parallel(
    work: Callable[[Any], Any], items: Sequence[Any], workers: int, *, option: str = "--workers",
    name: Callable[[Any], str] | None = None,
) -> Iterator[Any]:
    """`work` of every item, in order; the first error ends the others.

    Workers are copies of this process (fork) that see `work` and `items` as they are now; only
    their answers are sent. Copying memory they would wait for each other as threads, for Python's
    lock and for the kernel's on the address space. Where forking is not safe, outside Linux, they
    are threads all the same; one worker is this process.

    Args:
        option: the flag that sets `workers`, for the message.
        name: of an item, for the message.

    Raises:
        InputError: a worker was killed.
    """
    global _job
    if workers == 1 or len(items) < 2:
        yield from map(work, items)
        return
    workers = min(workers, len(items))
    pool: Executor
    if sys.platform == "linux":
        _job = work, items
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork"), _begin, (os.getpid(),)
        )
        answers, call = range(len(items)), _work
    else:
        pool, answers, call = ThreadPoolExecutor(workers), items, work
    done = 0
    try:
        for answer in pool.map(call, answers):
            yield answer
            done += 1
    except BrokenProcessPool as error:
        where = "" if name is None else f" at {name(items[done])} or after it"
        raise InputError(
            f"a worker process was killed{where}, by someone or for want of memory; free memory or "
            f"give fewer {option}."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _job = None


def peak_memory(workers: int) -> int:
    """Bytes this process and `workers` of its workers held at most, shared ones for each."""
    own, children = (resource.getrusage(who).ru_maxrss
                     for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * (own + workers * children)


def end_with(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Let this process get the signal `by` when its parent has ended, however that does; on
    Linux."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it was gone before we asked
        os._exit(1)


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends us
    end_with(parent)


def _work(number: int) -> Any:
    work, items = _job
    return work(items[number])
