"""Batches are taken over while the rank computes, and nothing else changes."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from megatron_vl.data.load.read_ahead import ReadAhead


class Numbers(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if index == 8:
            time.sleep(0.5)
        return index


@pytest.fixture
def iterator():
    made = iter(DataLoader(Numbers(), batch_size=2, num_workers=1, prefetch_factor=3))
    yield made
    made._shutdown_workers()


def test_batches_wait_here_before_they_are_asked_for(iterator):
    ahead = ReadAhead(iterator)
    deadline = time.monotonic() + 30
    while ahead._ready.qsize() < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ahead._ready.qsize() == 3, "as many as torch lets its workers read ahead"
    assert iterator._rcvd_idx == 0, "and none of them has been taken from the loader"
    assert [batch.tolist() for batch in iterator] == [[i, i + 1] for i in range(0, 12, 2)]
    ahead.close()
    assert not [one for one in threading.enumerate() if one.name == "read ahead"]
    ahead.close()


def test_a_worker_that_is_killed_is_noticed_and_nothing_waits_for_it(iterator):
    ahead = ReadAhead(iterator)
    next(iterator)
    (worker,) = iterator._workers
    started = time.monotonic()
    # torch's handler of SIGCHLD may raise at any line from the kill on.
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* (killed|exited)"):
        os.kill(worker.pid, signal.SIGKILL)
        list(iterator)
    ahead.close()
    assert time.monotonic() - started < 60


def test_a_pipe_that_breaks_before_its_worker_is_dead_names_the_worker(iterator):
    """A killed process closes its files first; seen in that moment, the pipe alone is broken."""
    ahead = ReadAhead(iterator)
    next(iterator)
    (worker,) = iterator._workers
    while not ahead._ready.empty():
        ahead._ready.get()
    ahead._ready.put(ConnectionResetError("the pipe broke"))
    threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL)).start()
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* (killed|exited)"):
        list(iterator)
    ahead.close()
