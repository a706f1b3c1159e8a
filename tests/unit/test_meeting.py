"""Nodes meet at a real store and agree how they ended; each is a thread.

`tests/distributed/test_launch.py` and `test_clusters.py` have nodes of real processes.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from megatron_vl.errors import InputError
from megatron_vl.launch import meeting
from megatron_vl.launch.launcher import End, _together, judge, starts_again
from megatron_vl.launch.meeting import agree, meet

HOST = socket.gethostname()


@pytest.fixture
def port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def at_once(work: Callable, nodes) -> list:
    """What `work` returns for every node, in order."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(work, nodes))


def come(port: int, **node):
    """The store, or the sentence by which a node is refused."""
    try:
        store, _ = meet(nproc_per_node=2, address="127.0.0.1", port=port, **{"timeout": 1, **node})
    except InputError as error:
        return str(error)
    return store


NODES = {  # each node's (nnodes, node_rank) -> what each says
    "the second never comes": (
        [(3, 0), (3, 2)],
        f"node(s) 1 of 3 never came to 127.0.0.1:{{port}} within 1 s, only 0 ({HOST}), 2 ({HOST}) "
        f"did; see what the missing ones printed"),
    "two with one number": (
        [(3, 0), (3, 1), (3, 1)],
        f"two nodes have the number 1, one on {HOST} and one on {HOST}; give every node a "
        f"--node-rank of its own."),
    "other numbers of nodes": ([(3, 0), (2, 1)], "nnodes is "),
    "nobody listens": (
        [(2, 1)],
        "node 1 could not meet the others at 127.0.0.1:{port} (Connection refused); give every "
        "node node 0's address as --master-addr"),
}


@pytest.mark.parametrize(("nodes", "sentence"), NODES.values(), ids=NODES)
def test_nodes_that_do_not_come_together_say_which_and_where(nodes, sentence, port):
    said = at_once(lambda node: come(port, nnodes=node[0], node_rank=node[1]), nodes)
    assert all(line.startswith(sentence.format(port=port)) for line in said), said


@pytest.mark.parametrize("order", [(0, 1, 1), (1, 0, 1), (1, 1, 0)], ids=str)
def test_two_with_one_number_are_told_whoever_comes_last(order, port):
    """Who comes after them completes the nodes, but does not make two of the one."""
    stores = [TCPStore("127.0.0.1", port, None, one == 0, wait_for_workers=False)
              for one in range(3)]

    def come_in_order(place: int):
        time.sleep(0.03 * place)  # less than between two looks at the store
        return come(port, nnodes=3, node_rank=order[place], store=stores[place])

    said = at_once(come_in_order, range(3))
    assert all(str(one).startswith("two nodes have the number 1, ") for one in said), said


def test_nodes_that_cannot_meet_are_told_where_and_what_to_mend(capfd):
    with socket.socket(socket.AF_INET6) as taken:  # as by another run, or by another node 0
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = come(port, nnodes=2, node_rank=0)
    assert said.startswith(f"node 0 could not meet the others at 127.0.0.1:{port}; ")
    assert "--master-addr" in said and "--master-port" in said
    assert "Traceback" not in capfd.readouterr().err


def test_node_0_stays_until_the_others_know_how_it_ended(port, capfd):
    stores = {node: TCPStore("127.0.0.1", port, None, node == 0, wait_for_workers=False)
              for node in range(3)}

    def leave(node: int) -> set[int]:
        time.sleep(0.3 * node)  # node 0 has ended before the others ask how it did
        store = stores.pop(node)  # the last to hold it: with node 0's the server goes
        return set(agree(store, 0, nnodes=3, node_rank=node, end={"final": True}, timeout=60,
                         tell=pytest.fail))

    assert all(0 in said for said in at_once(leave, range(3)))
    assert capfd.readouterr().err == "", "frames of C++ where a store is gone"


class Deaf:
    """Stands for a connection to a host that is gone: no answer, and no error."""

    def __init__(self):
        self.closed = threading.Event()

    def __call__(self, *_, **__):
        self.closed.wait(60)


def test_a_store_that_never_answers_is_not_waited_for_beyond_the_timeout(monkeypatch):
    monkeypatch.setattr(meeting, "_MARGIN_SECONDS", 0.5)
    monkeypatch.setattr(meeting, "_TELL_SECONDS", 0.2)
    deaf, told, end = Deaf(), [], {"final": False}
    monkeypatch.setattr(meeting, "_exchange", deaf)
    began = time.monotonic()
    assert agree(None, 0, nnodes=3, node_rank=1, end=end, timeout=0.5, tell=told.append) == {1: end}
    assert time.monotonic() - began < 10
    assert told == [{0, 2}], "who is waited for is said meanwhile"
    deaf.closed.set()


BEFORE, BEHIND = dict(stepped=False, stopped=False), dict(stepped=True, stopped=False)
ONE_ENDS = {  # how node 0's ranks end, how node 1's do -> the job's code, whether all start again
    "bad input": ((1, [1], BEHIND), (2, [2], BEHIND), 2, False),
    "killed before its first step": ((1, [1], BEFORE), (1, [-9], BEFORE), 1, True),
    "killed in training": ((1, [1], BEHIND), (1, [-9], BEHIND), 1, True),
    "broken before the first step": ((1, [1], BEFORE), (1, [1], BEFORE), 1, False),
}


@pytest.mark.parametrize(("zero", "one", "code", "again"), ONE_ENDS.values(), ids=ONE_ENDS)
def test_nodes_start_again_together_or_not_at_all(zero, one, code, again, port, capsys):
    stores = {}  # kept, as while the ranks run

    def end(node: int) -> tuple[int, bool]:
        code, exits, done = (zero, one)[node]
        me = dict(nnodes=2, node_rank=node, timeout=20)
        store = stores[node] = come(port, **me)
        time.sleep(0.3 * (1 - node))  # node 0's ranks fail for node 1's
        ended = _together(End(code=code, **judge(code, exits, **done)), "train", store, 0,
                          hosts=[HOST, HOST], node_rank=node, timeout=20)
        if starts_again(ended, 0, max_restarts=1):
            assert come(port, **me, attempt=1, store=store) is store
            return ended.code, True
        return ended.code, False

    began = time.monotonic()
    assert at_once(end, range(2)) == [(code, again)] * 2
    assert time.monotonic() - began < 15, "nobody waited for a node that does not come"
    said = capsys.readouterr().err
    told = f"megatron-vl train: node 1 ({HOST}) ended with code 2; it says why\n"
    assert said == (told if code == 2 else "")
