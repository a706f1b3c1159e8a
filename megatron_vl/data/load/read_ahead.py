"""Takes batches over from the reading processes while the rank computes."""

from __future__ import annotations

import queue
import sys
import threading
from multiprocessing.connection import wait

from torch.utils.data.dataloader import _BaseDataLoaderIter

_POLL_SECONDS = 5.0  # how long an idle wait may be; batches and the end are noticed at once


class ReadAhead:
    """A thread that empties the pipe of a torch data loader's workers.

    A batch is mapped from shared memory, page by page, in milliseconds. Where torch pins memory it
    has a thread of its own for that, and none on the CPU. What waits here has not been taken from
    the loader: its state, and how many batches its workers read ahead, stay as they are.
    """

    def __init__(self, iterator: _BaseDataLoaderIter):
        """`iterator`: one with worker processes, and no thread of torch's."""
        self._from_workers = iterator._worker_result_queue
        self._workers = iterator._workers
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._take, name="read ahead", daemon=True)
        self._thread.start()
        iterator._data_queue = self

    @staticmethod
    def fits(iterator: _BaseDataLoaderIter | None) -> bool:
        """Whether there is a pipe to empty, and nobody who does it."""
        return hasattr(iterator, "_worker_result_queue") and not iterator._pin_memory

    def get(self, timeout: float):
        """The next batch that has arrived, in the way of `queue.Queue`.

        Raises:
            queue.Empty: none arrived within `timeout` seconds.
        """
        item = self._ready.get(timeout=timeout)
        if isinstance(item, Exception):
            self._let_the_dead_be_known()
            raise item
        return item

    def close(self) -> None:
        """Stop taking; to be called before the workers end."""
        if self._done.is_set():
            return
        self._done.set()
        if sys.is_finalizing():
            return  # the thread is gone, and one that a put would start can never begin
        self._from_workers.put((None, None))  # wakes the thread
        self._thread.join(_POLL_SECONDS)  # it cannot end where a killed worker left half a batch
        self._from_workers.cancel_join_thread()  # or Python waits at its end for what was put
        self._from_workers.close()

    def _let_the_dead_be_known(self) -> None:
        """Wait for a worker that is ending: its pipes close a moment before it can be seen dead.

        torch then names the worker that was killed, and not the pipe that broke.
        """
        ending = wait([worker.sentinel for worker in self._workers], _POLL_SECONDS)
        for worker in self._workers:
            if worker.sentinel in ending:
                worker.join()

    def _take(self) -> None:
        while not self._done.is_set():
            try:
                item = self._from_workers.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            except Exception as error:  # passed on: torch explains it where the batch is asked for
                item = error
            self._ready.put(item)
