"""What only a real launcher and its processes show of how a job ends and is started again.

The ranks here are stand-ins for `python -m megatron_vl ...`: a few lines that fail at once. How an
end is judged and told is in `tests/unit/test_restart.py` and `test_launch_endings.py`, how nodes
meet and agree in `test_meeting.py`, how a rank hears that it is to stop in `test_stop.py`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from commands import ROOT, imports_torch

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

RANK = """#!{python}
import os, signal, sys, time
from megatron_vl.launch.worker import FAILURE_FILE, STEPPED, STOP, beside_failure, fail
rank = int(os.environ["RANK"])
attempt = int(os.environ["TORCHELASTIC_RUN_ID"].rpartition("-")[2])
def say(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one go
{body}
"""

LAUNCHER = """
import sys
sys.executable = {rank!r}
from megatron_vl.launch.launcher import launch
sys.exit(launch(["train"], nproc_per_node=2, {settings}))
"""


@pytest.fixture
def start(tmp_path):
    """Start a launcher whose two ranks run `body`."""
    jobs = []

    def start(body: str, settings: str) -> subprocess.Popen:
        rank = tmp_path / "rank"
        rank.write_text(RANK.format(python=sys.executable, body=body))
        rank.chmod(0o755)
        script = tmp_path / f"launcher{len(jobs)}.py"
        script.write_text(LAUNCHER.format(rank=str(rank), settings=settings))
        jobs.append(subprocess.Popen(
            [sys.executable, script], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
        job.wait()
    for process in psutil.process_iter(["cmdline"]):  # ranks of a test that failed
        if str(tmp_path / "rank") in (process.info["cmdline"] or []):
            process.kill()


DIE = "os.kill(os.getpid(), signal.SIGKILL)"


def test_a_killed_rank_is_started_again_with_all_others(start):
    body = f"if rank and attempt == 0: {DIE}\ntime.sleep(0 if attempt else 60)\nsay('done', rank)"
    job = start(body, "max_restarts=2")
    out, errors = job.communicate(timeout=90)
    assert errors == (
        "megatron-vl train: rank 1 was ended by SIGKILL; the machine may have run out of memory.\n"
        "megatron-vl train: starting all processes again, restart 1 of 2 (max-restarts)\n"
    )
    assert (job.returncode, sorted(out.splitlines())) == (0, ["done 0", "done 1"])


def test_bad_input_ends_a_job_with_its_message_and_code_whoever_ends_first(start):
    job = start("""
beside_failure(STEPPED).touch()
if rank:
    fail(2, "megatron-vl train: no data; give some.")
    time.sleep(60)
while not os.path.exists(os.environ[FAILURE_FILE]): time.sleep(0.02)
sys.exit(1)
""", "max_restarts=2")
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (2, "megatron-vl train: no data; give some.\n")


def test_all_nodes_start_their_ranks_again_together(start):
    """A rank of node 1 dies before its first step; node 0's fail for it, as those that wait for it
    would, and alone would not be started again."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    body = (
        f"if attempt == 0 and rank == 3: {DIE}\n"
        "if attempt == 0:\n    time.sleep(1)\n    sys.exit(fail(1, 'closed'))\n"
        "say('rank', rank, 'attempt', attempt)"
    )
    jobs = [
        start(body, f"nnodes=2, node_rank={node}, master_addr='127.0.0.1', master_port={port}, "
                    f"rendezvous_timeout=60, max_restarts=1")
        for node in (0, 1)
    ]
    began = time.monotonic()
    said = [job.communicate(timeout=90) for job in jobs]
    assert time.monotonic() - began < 55, "nobody waited for a node that does not come"
    assert [job.returncode for job in jobs] == [0, 0], said
    assert sorted("".join(out for out, _ in said).splitlines()) == [
        f"rank {rank} attempt 1" for rank in range(4)]


def test_a_signal_ends_the_ranks_of_a_run_that_does_not_save(start):
    job = start("say(os.getpid())\ntime.sleep(60)", "")
    ranks = [int(job.stdout.readline()) for _ in range(2)]
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM
    assert errors == "megatron-vl train: ended by SIGTERM\n"
    assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks)


WAIT_FOR_STOP = """
from megatron_vl.launch.stop import StopRequest
stop = StopRequest(beside_failure(STOP))
stop.listen()
say(os.getpid())
while not stop.reason: time.sleep(0.05)
say(rank, stop.reason)
time.sleep({longer})
"""


@pytest.mark.parametrize(("whom", "name"), [("ranks", "SIGUSR1"), ("all", "SIGTERM")])
def test_a_signal_lets_a_run_save(whom, name, start):
    job = start(WAIT_FOR_STOP.format(longer=0), "saves=True, max_restarts=3")
    ranks = [int(job.stdout.readline()) for _ in range(2)]
    told = {"ranks": ranks, "all": [job.pid, *ranks]}[whom]
    for one in told:
        os.kill(one, signal.Signals[name])
    out, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors
    assert sorted(out.splitlines()) == [f"0 {name}", f"1 {name}"]


def test_a_signal_to_the_launcher_lets_ranks_save_and_a_second_ends_them(start):
    job = start(WAIT_FOR_STOP.format(longer=60), "saves=True")
    ranks = [int(job.stdout.readline()) for _ in range(2)]
    job.send_signal(signal.SIGTERM)
    assert "a second signal ends the run at once" in job.stderr.readline()
    assert sorted(job.stdout.readline() for _ in ranks) == ["0 SIGTERM\n", "1 SIGTERM\n"]
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=20)  # torch's launcher gives ranks 30 s to listen
    assert job.returncode == 128 + signal.SIGTERM
    assert errors == "megatron-vl train: ended by SIGTERM\n"
    assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks)


@pytest.mark.cold
def test_ctrl_c_while_ranks_import_is_one_line(model_dir, wds_dir):
    job = psutil.Popen(
        [sys.executable, "-m", "megatron_vl", "train", "--hf-config", model_dir,
         "--train-data-path", wds_dir, "--nproc-per-node", "2", "--global-batch-size", "2"],
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )
    ranks, deadline = [], time.monotonic() + 60
    while len(ranks) < 2 and time.monotonic() < deadline:
        ranks = [one for one in job.children() if imports_torch(one, "LOCAL_RANK")]
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal sends it, to all at once
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (130, "megatron-vl train: ended by SIGINT\n")
    assert len(ranks) == 2 and not any(one.is_running() for one in ranks)
