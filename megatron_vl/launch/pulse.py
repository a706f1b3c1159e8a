"""Says which node of a run has fallen silent, while its ranks still wait for the hang timeout.

Ranks wait for one another without a word, and those of a host that is gone can say nothing. So
every launcher counts on in node 0's store: node 0 reads all counts, and to the others the answer is
node 0's sign of life. It is only told; what becomes of the run is decided by the ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from megatron_vl.launch.store_thread import StoreThread

BEAT_SECONDS = 2.0
QUIET_SECONDS = 10.0  # after which a node is called silent
_LEAVE_SECONDS = 2.0  # that a node's last word may take
_LEFT = 1 << 40  # added to the count of a node that has ended this attempt


class Pulse:
    """This node's part in one attempt, between `with`.

    Args:
        store: what `meet` returned; connected to once more, as a call that gets no answer keeps
            all others of its connection waiting.
        hosts: each node's.
        say: prints a sentence.
    """

    def __init__(
        self, store, attempt: int, *, node_rank: int, hosts: Sequence[str],
        say: Callable[[str], None], beat_seconds: float = BEAT_SECONDS,
        quiet_seconds: float = QUIET_SECONDS,
    ):
        self._store, self._attempt = store, attempt
        self._me, self._hosts, self._say = node_rank, hosts, say
        self._beat_seconds, self._quiet_seconds = beat_seconds, quiet_seconds
        others = range(1, len(hosts)) if node_rank == 0 else [0]
        self._heard = dict.fromkeys(others, time.monotonic())  # of nodes that have not left
        self._closed = threading.Event()
        self._beating = StoreThread(target=self._beat, name="pulse")
        self._watching = threading.Thread(target=self._watch, name="pulse watch", daemon=True)

    def __enter__(self) -> Pulse:
        self._beating.start()
        self._watching.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        self._watching.join()
        self._beating.join(_LEAVE_SECONDS)  # longer where node 0 does not answer

    def _beat(self) -> None:
        from torch.distributed import DistError, PrefixStore, TCPStore

        try:
            board = PrefixStore(f"pulse {self._attempt}", TCPStore(
                self._store.host, self._store.port, None, False, timedelta(minutes=1),
                wait_for_workers=False,
            ))
            exchange = self._read_others if self._me == 0 else self._count_on
            exchange(board)
        except DistError:
            self._heard.clear()  # node 0's launcher has ended, as its ranks will tell

    def _count_on(self, board) -> None:
        while not self._closed.is_set():
            board.add(str(self._me), 1)
            self._heard[0] = time.monotonic()
            self._closed.wait(self._beat_seconds)
        board.add(str(self._me), _LEFT)

    def _read_others(self, board) -> None:
        counts = dict.fromkeys(self._heard, 0)
        while not self._closed.wait(self._beat_seconds):
            for node in list(self._heard):
                count = board.add(str(node), 0)
                if count >= _LEFT:
                    del self._heard[node]
                elif count != counts[node]:
                    counts[node], self._heard[node] = count, time.monotonic()

    def _watch(self) -> None:
        silent: dict[int, float] = {}  # node -> when it was heard last
        while not self._closed.wait(self._beat_seconds):
            for node, heard in list(self._heard.items()):
                named = f"node {node} ({self._hosts[node]})"
                quiet = time.monotonic() - heard
                if node not in silent and quiet > self._quiet_seconds:
                    silent[node] = heard
                    self._say(f"{named} has been silent for {quiet:.0f} s; see that the host is up "
                              f"and its network works")
                elif node in silent and quiet <= self._quiet_seconds:
                    self._say(f"{named} is heard again, after {heard - silent.pop(node):.0f} s")
