"""The nodes of a run meet at node 0's store, before any rank is started.

torchrun's own rendezvous waits in silence, and says neither which node is missing nor that two have
one number. Its store is this one: a second server of the same port and process is the first.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from megatron_vl.errors import InputError
from megatron_vl.launch.interface import address_towards
from megatron_vl.launch.store_thread import StoreThread

_LOOK_SECONDS = 0.2  # between two looks at the store
_TELL_SECONDS = 10.0  # after which it is said who is waited for
_MARGIN_SECONDS = 10.0  # for the last words, beyond a timeout
_ALL_CAME = "all came"


def meet(
    *, nnodes: int, node_rank: int, nproc_per_node: int, address: str, port: int, timeout: float,
    attempt: int = 0, store=None,
):
    """Wait until all nodes have come, `timeout` seconds at most.

    Returns:
        the store to keep; and the nodes in order: `host`, its name, and `address` towards node 0.

    They meet again for every attempt, at the same `store`: the first of them to be there again
    must not find one that is about to close.

    Raises:
        InputError: node 0 cannot be reached, a node did not come, two came with one number, or
            nodes differ in how many nodes or processes there are.
    """
    from torch.distributed import DistError, PrefixStore, TCPStore

    deadline = time.monotonic() + timeout
    if node_rank and store is None:
        _wait_for_port(node_rank, address, port, deadline)
    me = {"node": node_rank, "host": socket.gethostname(), "nnodes": nnodes,
          "nproc_per_node": nproc_per_node,
          "address": address_towards(address, port) if node_rank else ""}

    def come() -> tuple[str, list[dict]]:
        """The verdict, and who came."""
        board = PrefixStore(f"meeting {attempt}", store)
        number = board.add("came", 1)
        board.set(f"{number}", json.dumps(me))
        if quarrel := _quarrel(_came(board, number)):
            board.set("verdict", quarrel)
        elif number == nnodes:
            board.set("verdict", _ALL_CAME)
        while not board.check(["verdict"]):
            if time.monotonic() > deadline:
                came = _came(board, board.add("came", 0))
                board.set("verdict", _missing(came, nnodes, address, port, timeout))
            time.sleep(_LOOK_SECONDS)
        verdict = board.get("verdict").decode()
        board.add("heard", 1)
        # Node 0 leaves last: the others hear why from its store.
        patience = time.monotonic() + 5
        while verdict != _ALL_CAME and node_rank == 0 and board.add("heard", 0) < board.add(
                "came", 0):
            if time.monotonic() > patience:
                break
            time.sleep(_LOOK_SECONDS)
        return verdict, _came(board, nnodes) if verdict == _ALL_CAME else []

    try:
        store = store or TCPStore(
            address, port, None, node_rank == 0, timedelta(seconds=max(timeout, 1)),
            wait_for_workers=False, multi_tenant=True,
        )
        heard = _Task(come).result(deadline + _MARGIN_SECONDS)
    except DistError as error:
        raise InputError(no_meeting(node_rank, address, port)) from error
    if heard is None:
        raise InputError(no_meeting(node_rank, address, port, f" (silent for {timeout:g} s)"))
    verdict, nodes = heard
    if verdict != _ALL_CAME:
        raise InputError(verdict)
    return store, sorted(nodes, key=lambda one: one["node"])


def agree(
    store, attempt: int, *, nnodes: int, node_rank: int, end: dict, timeout: float,
    tell: Callable[[set[int]], None],
) -> dict[int, dict]:
    """Wait until every node has said how an attempt ended for it, or one that there is no other.

    Args:
        store: what `meet` returned.
        end: what this node says: `final` (bool) and whatever else the others should know.
        timeout: seconds to wait for nodes whose ranks have not ended yet.
        tell: is given the nodes that are waited for, if it takes long.

    Returns:
        node -> what it said; without those that are silent. Node 0's store may be gone with it:
        then this node's alone.
    """
    from torch.distributed import DistError

    said = {node_rank: end}
    deadline = time.monotonic() + timeout
    task = _Task(lambda: _exchange(store, attempt, said, nnodes, node_rank, deadline))
    try:
        task.result(min(deadline, time.monotonic() + _TELL_SECONDS))
        if not task.ended and (silent := set(range(nnodes)) - set(said)):
            tell(silent)
        task.result(deadline + _MARGIN_SECONDS)
    except DistError:
        pass
    return dict(said)


class _Task(StoreThread):
    """Calls of a store whose result need not be waited for."""

    def __init__(self, work: Callable[[], object]):
        super().__init__()
        self._work, self._result, self._error, self.ended = work, None, None, False
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except Exception as error:
            self._error = error
        self.ended = True

    def result(self, until: float):
        """What the work returns; None if it has not ended at `until`, by time.monotonic."""
        self.join(max(0.0, until - time.monotonic()))
        if self._error is not None:
            raise self._error
        return self._result


def _exchange(store, attempt: int, said: dict[int, dict], nnodes: int, node_rank: int,
              deadline: float) -> None:
    """Say what `said` holds of this node, and fill in the others."""
    from torch.distributed import PrefixStore

    board = PrefixStore(f"end {attempt}", store)
    board.set(str(node_rank), json.dumps(said[node_rank]))
    while True:
        for node in set(range(nnodes)) - set(said):
            if board.check([str(node)]):
                said[node] = json.loads(board.get(str(node)))
        if len(said) == nnodes or any(one["final"] for one in said.values()):
            break
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_SECONDS)
    board.add("heard", 1)
    # Node 0 leaves last, if it leaves: the others hear of it from its store, and torch prints
    # frames of C++ where one finds it gone.
    patience = time.monotonic() + 5
    while node_rank == 0 and board.add("heard", 0) < nnodes:
        if time.monotonic() > patience:
            break
        time.sleep(_LOOK_SECONDS)


def meet_alone():
    """The store of a run of one node: a free port that only this machine can reach."""
    from torch.distributed import TCPStore

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    listening.listen()
    return TCPStore(
        "127.0.0.1", port, None, True, timedelta(minutes=1), wait_for_workers=False,
        multi_tenant=True, master_listen_fd=listening.detach(), use_libuv=False,
    )


def no_meeting(node_rank: int, address: str, port: int, why: str = "") -> str:
    return (
        f"node {node_rank} could not meet the others at {address}:{port}{why}; give every node "
        f"node 0's address as --master-addr, a port that is free there and open to the others as "
        f"--master-port, and a --node-rank of its own."
    )


def _wait_for_port(node_rank: int, address: str, port: int, deadline: float) -> None:
    """Until node 0 listens. Its name may not be known yet, as a pod's is not before it runs."""
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(left, 10))).close()
            return
        except OSError as error:
            if left <= 0:
                why = f" ({error.strerror or error})"
                raise InputError(no_meeting(node_rank, address, port, why)) from error
        time.sleep(_LOOK_SECONDS)


def _came(board, number: int) -> list[dict]:
    """What the first `number` nodes to come said."""
    return [json.loads(board.get(str(k))) for k in range(1, number + 1)]


def _quarrel(came: list[dict]) -> str:
    """Why those that came do not fit together; empty if they do.

    All of them are looked at, not the last alone: it may complete the nodes after two others that
    do not fit, before anybody has heard of those.
    """
    seen = {}
    for one in came:
        for name in ("nnodes", "nproc_per_node"):
            if came[0][name] != one[name]:
                flag = name.replace("_", "-")
                return (
                    f"{flag} is {came[0][name]} on node {came[0]['node']} ({came[0]['host']}) but "
                    f"{one[name]} on node {one['node']} ({one['host']}); give every node the same "
                    f"--{flag}."
                )
        if one["node"] in seen:
            return (
                f"two nodes have the number {one['node']}, one on {seen[one['node']]} and one on "
                f"{one['host']}; give every node a --node-rank of its own."
            )
        seen[one["node"]] = one["host"]
    return ""


def _missing(came: list[dict], nnodes: int, address: str, port: int, timeout: float) -> str:
    here = sorted((one["node"], one["host"]) for one in came)
    missing = sorted(set(range(nnodes)) - {node for node, _ in here})
    return (
        f"node(s) {', '.join(map(str, missing))} of {nnodes} never came to {address}:{port} within "
        f"{timeout:g} s, only {', '.join(f'{node} ({host})' for node, host in here)} did; see what "
        f"the missing ones printed, and that they reach that address and port."
    )
