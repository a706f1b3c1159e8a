"""Several nodes on one machine: each is a launcher of its own, and they meet over loopback."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from commands import ROOT, Done, environment_with, executed_by, free_port
from distributed_launch import LAUNCHER, words

import megatron_vl.launch.hosts
from megatron_vl.launch.hosts import host_script

HOST = socket.gethostname()


def start(command: list[object], *, cwd: Path = ROOT, **environment: object) -> subprocess.Popen:
    """A node's command, in the environment of a machine that no scheduler manages, and more."""
    env = {name: value for name, value in environment_with().items()
           if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    env |= {name: str(value) for name, value in environment.items()}
    command = [str(word) for word in command]
    if command[0] == "bash":
        said, command, env = executed_by(command, env)
        assert command is not None, said.text
    return subprocess.Popen(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )


def finish(jobs: list[subprocess.Popen], timeout: float = 600) -> list[Done]:
    try:
        said = [job.communicate(timeout=timeout) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [Done(job.returncode, *texts) for job, texts in zip(jobs, said, strict=True)]


def dlc(node: int, port: int, nodes: int = 2) -> dict[str, object]:
    """What a DLC job sets on a node."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": nodes, "RANK": node}


@pytest.mark.cold
def test_two_nodes_by_plain_names_train_without_a_word_too_much_and_leave_nothing(
        workshop, tmp_path, request):
    """As ms-swift, LLaMA-Factory and scripts around torchrun name the nodes."""
    # Not below tmp_path: Python's sockets in it may have 107 letters.
    port, temporary = free_port(), Path(tempfile.mkdtemp(prefix="nodes-"))
    request.addfinalizer(partial(shutil.rmtree, temporary))
    command = [sys.executable, "-m", "megatron_vl", "train", "--load", workshop.weights(1, 1),
               "--train-data-path", workshop.wds_dir, "--train-iters", 2, "--global-batch-size", 2,
               "--seq-length", 256, "--packing-buffer-size", 16, "--eval-interval", 0,
               "--no-report", "--save", tmp_path / "run"]
    first, second = finish([
        start(command, NNODES=2, NODE_RANK=node, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
              NPROC_PER_NODE=1, TMPDIR=temporary)
        for node in range(2)
    ])
    assert (first.code, second.code) == (0, 0), first.text + second.text
    assert "iteration 2/2" in first.out and "TP1xPP1xDP2" in first.out
    assert second.out == (f"node 1 of 2, 1 processes each, node 0 is 127.0.0.1:{port} (NNODES and "
                          f"NODE_RANK)\n")
    assert (first.err, second.err) == ("", "")
    assert list(temporary.iterdir()) == []


# `time.time` an hour fast on the node that has it on its path.
FAST_CLOCK = "import time\nright = time.time\ntime.time = lambda: right() + 3600\n"


def test_two_nodes_of_two_processes_train_with_dlcs_variables(workshop, tmp_path):
    """TP2 x DP2 by the positional script, with one node's clock wrong."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(FAST_CLOCK)
    command = ["bash", ROOT / LAUNCHER, *words(
        ENV="dlc", TP=2, TRAIN_ITERS=2, LR_WARMUP_ITERS=1, SAVE_INTERVAL=10,
        DATASET_PATH=workshop.wds_dir, VALID_DATASET_PATH=workshop.wds_dir,
        PRETRAIN_CHECKPOINT_PATH=workshop.weights(2, 1), OUTPUT_BASEPATH=tmp_path / "out",
    )]
    port = free_port()
    common = {"NPROC_PER_NODE": 2, "MP_EXTRA": "--eval-interval 0"}
    path = os.pathsep.join([str(tmp_path / "clock"), str(ROOT)])
    first, second = finish([
        start(command, **dlc(0, port), **common),
        start(command, **dlc(1, port), **common, PYTHONPATH=path),
    ])
    assert (first.code, second.code) == (0, 0), first.text + second.text
    assert f"node 0 of 2, 2 processes each, node 0 is 127.0.0.1:{port} (PAI-DLC)" in first.out
    assert "node 1 of 2" in second.out and "iteration" not in second.out
    seconds = re.search(r"^preflight: 4 ranks on 1 host agree, (\d+\.\d) s$", first.out, re.M)
    assert float(seconds[1]) < 10, "one gather, and small files"
    # Said, and no reason to stop; between two nodes rank 0's side is not to know who is right.
    assert f"preflight: the clock of ranks 2-3 ({HOST}) is 3600 s ahead of the others'" in first.out
    assert "TP2xPP1xDP2" in first.out and "iteration 2/2" in first.out
    assert list((tmp_path / "out" / "checkpoint").glob("*/iter_0000002"))


def test_ranks_that_differ_are_named_with_both_values_before_a_model_is_built(workshop, tmp_path):
    """The same relative paths on two nodes, each with files, a package and options of its own."""
    nodes = [tmp_path / "a", tmp_path / "b"]
    for node in nodes:
        shutil.copytree(workshop.weights(1, 1), node / "weights")
        shutil.copytree(workshop.wds_dir, node / "wds")
    (nodes[1] / "weights" / "merges.txt").unlink()
    (nodes[1] / "wds" / ".nv-meta" / "index.uuid").write_text("another one")
    other = nodes[1] / "packages"
    (other / "transformers-5.0.0.dist-info").mkdir(parents=True)
    (other / "transformers-5.0.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 5.0.0\n")
    port, environment = free_port(), {"PYTHONPATH": os.pathsep.join([str(other), str(ROOT)])}
    jobs = [
        start(
            [sys.executable, "-m", "megatron_vl", "train", "--load", "weights",
             "--train-data-path", "wds", "--lr", f"{1 + node}e-3", "--eval-interval", 0,
             "--global-batch-size", 2],
            cwd=nodes[node], **{**(environment if node else {}), **dlc(node, port)},
            NPROC_PER_NODE=1,
        ) for node in range(2)
    ]
    from importlib.metadata import version

    one, other = f"rank 0 ({HOST})", f"rank 1 ({HOST})"
    expected = [
        f"transformers is 5.0.0 on {other} but {version('transformers')} on {one}; ",
        f"option lr is 0.002 on {other} but 0.001 on {one}; ",
        f"weights/merges.txt is missing on {other} but ",
        "wds/.nv-meta/index.uuid is 11 bytes ",
    ]
    for done in finish(jobs):
        assert done.code == 2, done.text
        (said,) = [line for line in done.err.splitlines() if line.startswith("megatron-vl train:")]
        assert said.startswith("megatron-vl train: the ranks do not agree: ")
        assert [phrase for phrase in expected if phrase not in said] == []
        assert said.endswith("; give every node the same program, files and options.")
        assert "Traceback" not in done.text and "qwen2_vl on cpu" not in done.out


def test_ranks_that_never_come_are_named_with_the_address(workshop):
    """By another launcher than ours, which starts ranks and watches none of them."""
    here, nowhere = free_port(), free_port()
    command = [sys.executable, "-m", "megatron_vl", "train", "--load", workshop.weights(1, 1),
               "--train-data-path", workshop.wds_dir, "--distributed-timeout-minutes", 0.05]
    waits, seeks = finish([
        start(command, LOCAL_RANK=0, **dlc(0, here, nodes=3)),
        start(command, LOCAL_RANK=1, **dlc(1, nowhere, nodes=3)),
    ])
    assert (waits.code, seeks.code) == (2, 2)
    assert waits.err.splitlines()[-1].startswith(
        f"megatron-vl train: ranks 1-2 of 3 never came to 127.0.0.1:{here} within 0.05 min")
    assert seeks.err.splitlines()[-1].startswith(
        f"megatron-vl train: rank 1 on {HOST} could not reach the others at 127.0.0.1:{nowhere}")
    assert "Traceback" not in waits.text + seeks.text


# ---- a hostfile -------------------------------------------------------------------------------

# This stands for ssh and sshd where there is none; test_hosts.py has the real ones. Like them it
# passes one string to a shell, with its own standard input, and knows no working directory.
SSH = """#!/bin/sh
[ "$1 $2" = "-p 22" ] || exit 255
while [ "$1" != "${{1#-}}" ]; do shift 2; done
echo "$1" >> "{seen}"
shift
cd / && exec sh -c "$*"
"""


@pytest.fixture
def hosts(tmp_path):
    """Start `megatron-vl launch` on two hosts of one machine, through a stand-in of ssh."""
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(SSH.format(seen=tmp_path / "seen"))
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text("127.0.0.1 slots=2\nlocalhost slots=2\n")

    def launch(*command: object, options: tuple = (), cwd: Path = tmp_path) -> subprocess.Popen:
        return start(
            [sys.executable, "-m", "megatron_vl", "launch", "--hostfile", tmp_path / "hosts",
             "--ssh", "ssh -p 22", *options, "--", *command],
            cwd=cwd, PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        )

    return launch


def test_a_hostfiles_two_hosts_of_two_processes_train(hosts, workshop, tmp_path):
    here = tmp_path / "it's $HOME; #1"
    here.mkdir()
    (done,) = finish([hosts(
        "train", "--load", workshop.weights(1, 2), "--train-data-path", workshop.wds_dir,
        "--pipeline-model-parallel-size", 2, "--train-iters", 2, "--global-batch-size", 4,
        "--seq-length", 256, "--packing-buffer-size", 16, "--eval-interval", 0,
        "--save", "a run", options=("--master-port", free_port(), "--env", "PYTHONPATH"), cwd=here,
    )])
    assert done.code == 0, done.text
    assert sorted((tmp_path / "seen").read_text().split()) == ["127.0.0.1", "localhost"]
    assert "[localhost] node 1 of 2, 2 processes each" in done.out
    assert "[127.0.0.1] preflight: 4 ranks on 1 host agree" in done.out
    assert "[127.0.0.1] qwen2_vl on cpu, TP1xPP2xDP2" in done.out
    assert "[127.0.0.1] iteration 2/2" in done.out
    assert all(line.startswith(("[127.0.0.1] ", "[localhost] ")) for line in done.out.splitlines())
    assert (here / "a run" / "iter_0000002").is_dir()


# One host waits, the other fails; the waiting one notes how it ended.
FAIL = """
echo "word: $1" >&2
echo "at $MASTER_ADDR"
if [ "$RANK" = 1 ]; then while [ ! -e ready ]; do sleep 0.1; done; exit 7; fi
trap 'echo told > ended; exit 0' TERM
touch ready
while :; do sleep 0.1; done
"""
AWKWARD = """two words 'and' "more" $(touch bad) `touch bad` ; touch bad"""


def test_a_host_that_fails_ends_the_others_and_gives_its_code(hosts, tmp_path):
    started = time.monotonic()
    (done,) = finish([hosts(
        "sh", "-c", FAIL, "sh", AWKWARD, options=("--env", "MASTER_ADDR=10.0.0.9"),
    )], timeout=60)
    assert done.code == 7, done.text
    assert "at 10.0.0.9" in done.out
    assert time.monotonic() - started < 30
    assert f"[127.0.0.1] word: {AWKWARD}" in done.err.splitlines()
    assert "megatron-vl launch: localhost ended with code 7; the others were ended." in done.err
    assert (tmp_path / "ended").read_text() == "told\n" and not (tmp_path / "bad").exists()


def test_the_hosts_commands_end_when_the_launcher_is_killed(hosts, tmp_path):
    job = hosts("sh", "-c", FAIL.replace("exit 7", "sleep 60"), "sh", "x")
    while not (tmp_path / "ready").exists():
        time.sleep(0.1)
    job.send_signal(signal.SIGKILL)
    finish([job])
    deadline = time.monotonic() + 20
    while not (tmp_path / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (tmp_path / "ended").read_text() == "told\n"


def test_a_hosts_command_that_does_not_end_when_told_to_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron_vl.launch.hosts, "_SAVE_SECONDS", 1)
    monkeypatch.setattr(megatron_vl.launch.hosts, "_CLOSE_SECONDS", 1)
    deaf = "trap 'echo told >> told' TERM; touch ready; while :; do sleep 0.1; done"
    script = host_script(["sh", "-c", deaf], directory=str(tmp_path), variables={"A": "b"})
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE) as job:
        job.stdin.write(b"go\n")
        job.stdin.flush()
        while not (tmp_path / "ready").exists():
            time.sleep(0.1)
        job.stdin.close()
        assert job.wait(timeout=20) == 128 + signal.SIGKILL
    assert (tmp_path / "told").read_text() == "told\n" * 2


@pytest.mark.parametrize(("options", "sentence"), [
    (("--env", "A B=1"), "--env A B=1 names no variable"),
    (("--env", "RANK=1"), "launch sets it itself, to a host's place in the hostfile"),
    (("--env", "NPROC_PER_NODE=1"), "hosts says the processes of a host as slots"),
    (("--env", "NOT_SET_HERE"), "NOT_SET_HERE is not set here"),
    (("--ssh", "'"), "--ssh is"),
    (("--ssh", "no-such-ssh"), "no-such-ssh cannot be started (No such file or directory)"),
    (("--master-port", "0"), "master-port is 0"),
])
def test_a_launch_that_cannot_be_is_refused(hosts, options, sentence):
    (done,) = finish([hosts("true", options=options)])
    assert done.code == 2 and sentence in done.err and "Traceback" not in done.err, done.text
