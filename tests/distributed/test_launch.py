"""A job ends with one message and its code, whichever rank or signal ends it.

The ranks here are stand-ins for `python -m megatron_vl ...`: a few lines that fail at once.
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
from commands import ROOT

from megatron_vl.cli.worker import FAILURE_FILE, read_failure

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

RANK = """#!{python}
import os, signal, sys, time
from megatron_vl.cli.worker import fail
from megatron_vl.errors import InputError
rank = int(os.environ["RANK"])
def say(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one go
{body}
"""

LAUNCHER = """
import sys
sys.executable = {rank!r}
from megatron_vl.cli.launch import launch
from megatron_vl.errors import InputError
try:
    sys.exit(launch(["train"], nproc_per_node=2, {settings}))
except InputError as error:
    sys.exit(f"InputError: {{error}}")
"""


@pytest.fixture
def start(tmp_path):
    """Start a launcher whose two ranks run `body`."""
    jobs = []

    def start(body: str, settings: str = "") -> subprocess.Popen:
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


ENDINGS = {
    "bad input on every rank": (
        "sys.exit(fail(2, 'megatron-vl train: no data; give some.'))",
        2, "megatron-vl train: no data; give some.\n",
    ),
    "bad input on the rank that is last to end": (
        "fail(2, 'megatron-vl train: no data; give some.') if rank else None\n"
        "time.sleep(60 if rank else 2)\nsys.exit(1)",
        2, "megatron-vl train: no data; give some.\n",
    ),
    "something broke": (
        "time.sleep(0 if rank else 60)\nsys.exit(fail(1, 'Traceback\\nKeyError: 3\\n'))",
        1, "rank 1 failed:\nTraceback\nKeyError: 3\n",
    ),
    "killed": (
        "time.sleep(0 if rank else 60)\nos.kill(os.getpid(), signal.SIGKILL)",
        1, "megatron-vl train: rank 1 was ended by SIGKILL; the machine may have run out of "
           "memory.\n",
    ),
    "no message": (
        "time.sleep(0 if rank else 60)\nsys.exit(7)",
        1, "megatron-vl train: rank 1 ended with code 7 and no message.\n",
    ),
    "none": ("", 0, ""),
}


@pytest.mark.parametrize(("body", "code", "message"), ENDINGS.values(), ids=ENDINGS)
def test_a_job_ends_with_one_message_and_its_code(body, code, message, start):
    job = start(body)
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (code, message)


LEAVE = """
import sys, time
from megatron_vl.cli.meeting import agree
from torch.distributed import TCPStore
node, port = int(sys.argv[1]), int(sys.argv[2])
store = TCPStore("127.0.0.1", port, None, node == 0, wait_for_workers=False)
print("here", flush=True)
sys.stdin.readline()
time.sleep(node)  # node 0 has ended before the others ask how it did
said = agree(store, 0, nnodes=3, node_rank=node, end={"final": True, "code": 0}, timeout=60)
print(sorted(said))
"""


def test_node_0_stays_until_the_others_know_how_it_ended():
    port = a_free_port()
    jobs = []
    for node in range(3):
        jobs.append(subprocess.Popen(
            [sys.executable, "-c", LEAVE, str(node), str(port)], env=ENVIRONMENT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))
        assert jobs[-1].stdout.readline() == "here\n"
    for job in jobs:
        job.stdin.write("go\n")
        job.stdin.flush()
    for job in jobs:
        out, errors = job.communicate(timeout=60)
        assert errors == "" and "0" in out, "frames of C++ where a store is gone"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_launcher_ends_its_ranks_in_one_line(name, start):
    job = start("say(os.getpid())\ntime.sleep(60)")
    ranks = [int(job.stdout.readline()) for _ in range(2)]
    job.send_signal(signal.Signals[name])
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.Signals[name]
    # These ranks are not the program's own, which die of SIGINT without a word.
    own = errors if name == "SIGTERM" else errors[errors.rindex("megatron-vl train: "):]
    assert own == f"megatron-vl train: ended by {name}\n"
    assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks)


# Of a rank: which attempt this is, and the run has got past its first step.
ATTEMPT = "attempt = int(os.environ['TORCHELASTIC_RUN_ID'].rpartition('-')[2])\n"
STEPPED = "from megatron_vl.cli.worker import STEPPED, beside_failure\n" \
          "beside_failure(STEPPED).touch()\n"
DIE = "os.kill(os.getpid(), signal.SIGKILL)"

RESTARTS = {  # what the ranks do -> exit code, restarts, what is said last
    "killed once": (f"if rank and attempt == 0: {DIE}\ntime.sleep(0 if attempt else 60)", 0, 1,
                    "restart 1 of 2 (max-restarts)"),
    "killed again and again": (f"if rank: {DIE}\ntime.sleep(60)", 1, 2, "was ended by SIGKILL"),
    "something broke in training": (
        STEPPED + "if rank and attempt == 0: sys.exit(fail(1, 'KeyError: 3'))\n"
        "time.sleep(0 if attempt else 60)", 0, 1, "restart 1 of 2 (max-restarts)",
    ),
    "something broke before the first step": (
        "time.sleep(0 if rank else 60)\nsys.exit(fail(1, 'KeyError: 3'))", 1, 0, "KeyError: 3",
    ),
    "bad input in training": (
        STEPPED + "time.sleep(0 if rank else 60)\n"
        "sys.exit(fail(2, 'megatron-vl train: no data; give some.'))",
        2, 0, "no data; give some.",
    ),
}


@pytest.mark.parametrize(("body", "code", "restarts", "last"), RESTARTS.values(), ids=RESTARTS)
def test_ranks_are_started_again_where_that_may_help(body, code, restarts, last, start):
    job = start(ATTEMPT + body, "max_restarts=2")
    _, errors = job.communicate(timeout=90)
    assert job.returncode == code, errors
    assert errors.count("starting all processes again") == restarts
    assert errors.splitlines()[-1].rstrip().endswith(last) or last in errors.splitlines()[-1]


def test_all_nodes_start_their_ranks_again_together(start):
    """A rank of node 1 dies; node 0's fails for it, as one that waits for the other would."""
    port = a_free_port()
    body = ATTEMPT + (
        f"if rank == 3 and attempt == 0: {DIE}\n"
        f"{STEPPED}"
        "if attempt == 0 and rank < 2:\n    time.sleep(3)\n    sys.exit(fail(1, 'closed'))\n"
        "time.sleep(0 if attempt else 60)\nsay('rank', rank, 'attempt', attempt)"
    )
    jobs = [
        start(body, f"nnodes=2, node_rank={node}, master_addr='127.0.0.1', master_port={port}, "
                    f"rendezvous_timeout=60, max_restarts=1")
        for node in (0, 1)
    ]
    said = [job.communicate(timeout=90) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "".join(out for out, _ in said).count("attempt 1") == 4


ONE_ENDS = {  # node 1 in its first attempt -> how often the job is started again
    "bad input": ("sys.exit(fail(2, 'the learning rate is bad'))", 0),
    "killed before its first step": (DIE, 1),
}


@pytest.mark.parametrize(("end", "again"), ONE_ENDS.values(), ids=ONE_ENDS)
def test_nodes_start_again_together_or_not_at_all(end, again, start):
    """Node 0's ranks fail for node 1's: after a step, or before it."""
    port = a_free_port()
    body = ATTEMPT + ("" if again else STEPPED) + (
        f"if attempt == 0 and rank == 3: {end}\n"
        "if attempt == 0:\n    time.sleep(2)\n    sys.exit(fail(1, 'closed'))\n"
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
    assert [job.returncode for job in jobs] == ([0, 0] if again else [2, 2]), said
    assert "".join(out for out, _ in said).count("attempt 1") == 4 * again
    assert ("ended with code 2; it says why" in said[0][1]) == (not again)


WAIT_FOR_STOP = """
from megatron_vl.training.stop import StopRequest
from megatron_vl.cli.worker import STOP, beside_failure
stop = StopRequest(beside_failure(STOP))
stop.listen()
say(os.getpid())
while not stop.reason: time.sleep(0.05)
time.sleep({longer})
say(rank, stop.reason)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("whom", ["launcher", "rank", "all"])
def test_a_signal_lets_a_run_save(name, whom, start):
    job = start(WAIT_FOR_STOP.format(longer=0), "saves=True, max_restarts=3")
    ranks = [int(job.stdout.readline()) for _ in range(2)]
    if whom == "rank" and name == "SIGTERM":
        # Ours sends it to end a rank, after another one failed.
        os.kill(ranks[1], signal.SIGTERM)
        assert job.stdout.readline() == ""  # dead, and so is the attempt
        job.kill()
        return
    told = {"launcher": [job.pid], "rank": ranks, "all": [job.pid, *ranks]}[whom]
    for one in told:
        os.kill(one, signal.Signals[name])
    out, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors
    assert sorted(out.split()) == sorted(["0", "1", name, name])


def test_a_second_signal_ends_a_run_that_is_still_saving(start):
    job = start(WAIT_FOR_STOP.format(longer=60), "saves=True")
    ranks = [int(job.stdout.readline()) for _ in range(2)]
    job.send_signal(signal.SIGTERM)
    assert "a second signal ends the run at once" in job.stderr.readline()
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=20)  # torch's launcher gives ranks 30 s to listen
    assert job.returncode == 128 + signal.SIGTERM
    assert "megatron-vl train: ended by SIGTERM" in errors
    assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks)


def test_nodes_that_cannot_meet_are_told_where_and_what_to_mend(start):
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = start("", f"nnodes=2, node_rank=0, master_addr='127.0.0.1', master_port={port}")
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 1
    said = errors.splitlines()[-1]
    assert said.startswith(f"InputError: node 0 could not meet the others at 127.0.0.1:{port}; ")
    assert "--master-addr" in said and "--master-port" in said
    assert "Traceback" not in errors


def a_free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


NODES = {  # what each launcher is given beside its address -> what each says
    "the second never comes": (
        ["nnodes=3, node_rank=0", "nnodes=3, node_rank=2"],
        "node(s) 1 of 3 never came to 127.0.0.1:{port} within 3 s, only 0 ({host}), 2 ({host}) "
        "did; see what the missing ones printed",
    ),
    "two with one number": (
        ["nnodes=3, node_rank=0", "nnodes=3, node_rank=0"],
        None,  # only one of them can listen
    ),
    "two others with one number": (
        ["nnodes=3, node_rank=0", "nnodes=3, node_rank=1", "nnodes=3, node_rank=1"],
        "two nodes have the number 1, one on {host} and one on {host}; give every node a "
        "--node-rank of its own.",
    ),
    "other numbers of nodes": (
        ["nnodes=3, node_rank=0", "nnodes=2, node_rank=1"], "nnodes is ",
    ),
    "nobody listens": (
        ["nnodes=2, node_rank=1"],
        "node 1 could not meet the others at 127.0.0.1:{port} (Connection refused); give every "
        "node node 0's address as --master-addr",
    ),
}


@pytest.mark.parametrize(("nodes", "sentence"), NODES.values(), ids=NODES)
def test_nodes_that_do_not_come_together_say_which_and_where(nodes, sentence, start):
    port = a_free_port()
    jobs = [
        start("", f"{node}, master_addr='127.0.0.1', master_port={port}, rendezvous_timeout=3")
        for node in nodes
    ]
    said = [job.communicate(timeout=90)[1].splitlines()[-1] for job in jobs]
    assert all(job.returncode == 1 for job in jobs)
    if sentence is None:
        assert any("could not meet the others" in line for line in said), said
    else:
        expected = "InputError: " + sentence.format(port=port, host=socket.gethostname())
        assert all(line.startswith(expected) for line in said), said


CLAIM = """
import sys, time
from pathlib import Path
import os
from megatron_vl.cli.worker import FAILURE_FILE, fail
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
for turn in range(20):
    os.environ[FAILURE_FILE] = str(folder / f"failure-{turn}")
    (folder / f"ready-{turn}-{rank}").touch()
    while not (folder / f"ready-{turn}-{1 - int(rank)}").exists():
        pass
    fail(1, f"rank {rank} says " + "much " * 20000)
"""


def test_one_of_two_ranks_that_fail_at_once_is_heard_and_heard_whole(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(tmp_path)], text=True, stderr=subprocess.PIPE,
            env={**ENVIRONMENT, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    unseen = {tmp_path / f"failure-{turn}" for turn in range(20)}
    deadline = time.monotonic() + 60
    # Read each file as soon as it is there, as the launcher may.
    while unseen and time.monotonic() < deadline:
        for path in list(unseen):
            found = read_failure(path)
            if found is None:
                continue
            unseen.remove(path)
            code, report = found
            speaker = report.removeprefix("rank ")[0]
            said = f"rank {speaker} says " + "much " * 20000
            assert code == 1 and report == f"rank {speaker} failed:\n{said.rstrip()}\n"
    assert not unseen
    for rank in ranks:
        assert rank.communicate(timeout=60) == (None, "") and rank.returncode == 0


@pytest.mark.parametrize("where", [None, "gone/failure"])
def test_a_rank_without_our_launcher_speaks_itself(where, tmp_path):
    env = {**ENVIRONMENT, "RANK": "3"}
    env.pop(FAILURE_FILE, None)
    if where:
        env[FAILURE_FILE] = str(tmp_path / where)
    script = "from megatron_vl.cli.worker import fail; fail(1, 'KeyError: 3'); fail(2, 'no data')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, text=True, capture_output=True, timeout=60
    )
    assert done.stderr == "rank 3 failed:\nKeyError: 3\nno data\n" and done.returncode == 0


def imports_torch(process: psutil.Process, variable: str = "PATH") -> bool:
    try:
        # A process that is about to become another program has its parent's memory.
        return variable in process.environ() and any(
            "libtorch" in one.path for one in process.memory_maps()
        )
    except psutil.Error:  # not there yet, or gone
        return False


@pytest.mark.cold
@pytest.mark.parametrize(("importing", "said"), [
    ("the launcher", "megatron-vl train: interrupted\n"),
    ("its ranks", "megatron-vl train: ended by SIGINT\n"),
])
def test_ctrl_c_during_imports_is_one_line(importing, said, workshop):
    job = psutil.Popen(
        [sys.executable, "-m", "megatron_vl", "train", "--load", workshop.weights(1, 1),
         "--train-data-path", workshop.wds_dir, "--nproc-per-node", "2",
         "--global-batch-size", "2"],
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
        # As at a terminal, also where whoever runs the tests has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if importing == "the launcher" and imports_torch(job):
            break
        ranks = [one for one in job.children() if imports_torch(one, "LOCAL_RANK")]
        if importing == "its ranks" and len(ranks) == 2:
            break
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal sends it, to all at once
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (130, said)
