"""What a run listens on: the sockets of all its processes, looked at while it trains."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from distributed_launch import LAUNCHER, words
from test_clusters import ROOT, dlc, finish, free_port, start

pytestmark = pytest.mark.skipif(
    not Path("/proc/net/tcp").exists(), reason="reads Linux's /proc"
)

LISTENS = "0A"  # the state in /proc/net/tcp
LOOPBACK = {"0100007F", "00000000000000000000000001000000",
            "0000000000000000FFFF00000100007F"}  # 127.0.0.1, ::1, ::ffff:127.0.0.1


def family(root: int) -> set[int]:
    """A process and all it started."""
    found, new = set(), {root}
    while new:
        found |= new
        new = {int(child) for pid in new for task in Path(f"/proc/{pid}/task").glob("*")
               for child in _read(task / "children").split()} - found
    return found


def listening(root: int) -> set[tuple[str, int]]:
    """(address as the kernel writes it, port) of every listening TCP socket of a family."""
    sockets = set()
    for pid in family(root):
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
            except OSError:  # closed meanwhile
                continue
            if found:
                sockets.add(found[1])
    lines = [line.split() for name in ("tcp", "tcp6")
             for line in _read(Path(f"/proc/net/{name}")).splitlines()[1:]]
    places = [line[1].split(":") for line in lines if line[3] == LISTENS and line[9] in sockets]
    return {(address, int(port, 16)) for address, port in places}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # gone meanwhile
        return ""


def watched(jobs: list[subprocess.Popen]) -> list[set[tuple[str, int]]]:
    """What each listened on at any time until all ended, which was well."""
    seen = [set() for _ in jobs]
    while any(job.poll() is None for job in jobs):
        for one, job in zip(seen, jobs, strict=True):
            one |= listening(job.pid)
        time.sleep(0.05)
    done = finish(jobs)
    assert [one.code for one in done] == [0] * len(jobs), "\n".join(one.text for one in done)
    return seen


def training(workshop, out: Path, **changes) -> list[object]:
    return ["bash", ROOT / LAUNCHER, *words(
        TP=2, TRAIN_ITERS=2, LR_WARMUP_ITERS=1, SAVE_INTERVAL=10, DATASET_PATH=workshop.wds_dir,
        VALID_DATASET_PATH=workshop.wds_dir, PRETRAIN_CHECKPOINT_PATH=workshop.weights(2, 1),
        OUTPUT_BASEPATH=out, **changes,
    )]


def test_a_run_of_one_node_listens_on_loopback_alone(workshop, tmp_path):
    (seen,) = watched([start(training(workshop, tmp_path), MP_EXTRA="--eval-interval 0")])
    assert len(seen) > 2, "the store, and gloo of two ranks"
    assert {address for address, _ in seen} <= LOOPBACK


def test_nodes_bound_to_an_interface_open_the_meeting_port_alone_to_others(workshop, tmp_path):
    port = free_port()
    seen = watched([
        start(training(workshop, tmp_path, ENV="dlc"), **dlc(node, port), NPROC_PER_NODE=2,
              GLOO_SOCKET_IFNAME="lo", MP_EXTRA="--eval-interval 0")
        for node in (0, 1)
    ])
    for node, places in enumerate(seen):
        others = {where for where in places if where[0] not in LOOPBACK}
        assert {at for _, at in others} == ({port} if node == 0 else set())
        assert len(places - others) > 1
