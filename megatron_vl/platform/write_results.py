"""How the processes that write a checkpoint tell their rank what they wrote.

Megatron-Core starts a manager process for that. It imports torch anew, outlives a rank that was
killed and keeps the job's output open; and starting it makes Python take SIGTERM again, which a
rank leaves to a thread that lets it save. The file here needs no process.
"""

from __future__ import annotations

import os
import pickle
import queue


def install_write_results() -> None:
    """Give Megatron-Core the queue, before its first save."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = WriteResults()


class WriteResults:
    """A queue of one item, of this process and those it forks: the file they inherit."""

    def __init__(self) -> None:
        self._file = os.memfd_create("write results")

    def put(self, item: object) -> None:
        content = memoryview(pickle.dumps(item))
        os.ftruncate(self._file, 0)
        done = 0
        while done < len(content):
            done += os.pwrite(self._file, content[done:], done)

    def get_nowait(self) -> object:
        """Raises queue.Empty: nothing was put."""
        size = os.fstat(self._file).st_size
        if size == 0:
            raise queue.Empty
        content = b""
        while len(content) < size:
            content += os.pread(self._file, size - len(content), len(content))
        os.ftruncate(self._file, 0)
        return pickle.loads(content)  # from our own process, never from a file
