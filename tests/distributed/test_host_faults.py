"""What becomes of a run when a link or a host fails in mid-step or mid-save (`--hosts`).

Timeouts are short, so that a test takes a minute: a cut that outlasts them stands for a longer one
that outlasts the usual ones.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Hosts, Job, why_not
from training_over_hosts import ENVIRONMENT, Training, launch

STEPS = 30
HANG, MEET = 15, 20  # seconds: --hang-timeout, --rendezvous-timeout
SILENT = "has been silent for 1"  # and some seconds
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
pytestmark = [
    pytest.mark.hosts,
    pytest.mark.cold,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs"),
]


@pytest.fixture
def hosts(tmp_path) -> Iterator[Hosts]:
    """`desk`, where the command is given, and the run's hosts `one` and `two`."""
    with Hosts(tmp_path, "desk", "one", "two") as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(workshop, shared, tmp_path_factory) -> dict[int, float]:
    def train(out: Path) -> None:
        with Hosts(tmp_path_factory.mktemp("hosts"), "one", "two") as made:
            out.mkdir()
            job = Training(workshop, out, train_iters=STEPS).start(made["one"], ["one", "two"])
            assert job.wait(timeout=300) == 0, job.text

    return Training(workshop, shared.made("undisturbed_hosts", train)).losses


@pytest.fixture
def training(workshop, tmp_path) -> Training:
    return Training(workshop, tmp_path, train_iters=STEPS, hang_timeout=HANG,
                    rendezvous_timeout=MEET, max_restarts=2)


def ends(job: Job, code: int, *said: str, seconds: float = 180) -> None:
    """With this code, these words, and nothing of torch's C++ or a traceback."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.wait(timeout=seconds)
    assert job.poll() == code, job.text
    assert [words for words in said if words not in job.text] == [], job.text
    assert "frame #" not in job.text and "Traceback" not in job.text, job.text


def in_a_save(training: Training, job: Job) -> None:
    while not any(training.save.glob(".iter_*.partial")):
        assert job.poll() is None, job.text
        time.sleep(0.005)


def test_a_slow_link_that_loses_frames_changes_no_loss(hosts, training, undisturbed):
    job = training.start(hosts["desk"], ["one", "two"], hang_timeout=300)
    training.wait_for_step(2, job)
    hosts.order("delay", 0.2)
    hosts.order("loss", 0.05)
    training.wait_for_step(4, job)
    hosts.order("delay", 0)
    hosts.order("loss", 0)
    ends(job, 0)
    assert training.losses == undisturbed


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_cut_of_a_minute_is_told_and_changes_no_loss(moment, hosts, training, undisturbed):
    job = training.start(hosts["desk"], ["one", "two"], hang_timeout=300)
    training.wait_for_step(2, job)
    for seconds in (5, 60):
        training.wait_for_step(max(training.losses) + 1, job)
        if moment == "save":
            in_a_save(training, job)
        hosts["two"].cut()
        time.sleep(seconds)
        hosts["two"].mend()
    ends(job, 0, f"node 1 (two) {SILENT}", f"node 0 (one) {SILENT}", "is heard again", seconds=300)
    assert "starting all processes again" not in job.text
    assert training.losses == undisturbed


def test_a_cut_beyond_the_hang_timeout_starts_all_ranks_again(hosts, training, undisturbed):
    job = training.start(hosts["desk"], ["one", "two"], rendezvous_timeout=120)
    training.wait_for_step(7, job)
    in_a_save(training, job)
    hosts["two"].cut()
    job.wait_for("waiting up to 120 s for node 1 (two) to say how the run ended there")
    hosts["two"].mend()
    ends(job, 0, "no progress for", "restart 1 of 2")  # the other node may notice after the mend
    assert training.losses == undisturbed


@pytest.mark.parametrize(("lost", "kept"), [("two", "one"), ("one", "two")],
                         ids=["a host", "the host of node 0"])
def test_a_host_that_dies_is_named_and_another_takes_its_place(
        lost, kept, hosts, training, undisturbed):
    job = training.start(hosts["desk"], ["one", "two"])
    training.wait_for_step(7, job)
    hosts[lost].kill()
    killed = time.monotonic()
    node = ["one", "two"].index(lost)
    silent = f"node {node} ({lost}) did not say within {MEET} s how the run ended there"
    job.wait_for(f"node {node} ({lost}) {SILENT}")
    assert time.monotonic() - killed < HANG
    job.wait_for("no progress for", silent)
    assert time.monotonic() - killed < HANG + MEET + 30
    ends(job, 1, f"{lost} did not end within 60 s")
    assert not hosts[kept].processes("megatron_vl")
    hosts.add("spare")
    again = training.start(hosts["desk"], [kept, "spare"])
    ends(again, 0, "resumed from")
    assert training.losses == undisturbed


def test_a_run_that_lost_its_launcher_keeps_others_out_of_its_save(hosts, training):
    """Cut off from the desk, the hosts train on; the same command elsewhere is refused."""
    job = training.start(hosts["desk"], ["one", "two"], train_iters=10_000)
    training.wait_for_step(3, job)
    hosts["desk"].cut()
    again = training.start(hosts["one"], ["one", "two"], train_iters=10_000, port=29501)
    ends(again, 2, f"{training.save} is being written by another run, process ")
    hosts["desk"].mend()
    job.signal(9)
    job.wait()
    left = time.monotonic() + 90
    while any(host.processes("megatron_vl") for host in hosts):
        assert time.monotonic() < left, "ranks are left behind"
        time.sleep(0.5)


def test_three_hosts_of_one_process_train(hosts, training):
    job = training.start(hosts["one"], ["one", "two", "desk"], pipeline_model_parallel_size=1,
                         train_iters=2, global_batch_size=3)
    ends(job, 0, "[one] preflight: 3 ranks on 3 hosts agree", "TP1xPP1xDP3")


def test_a_clock_that_is_off_by_an_hour_is_told_and_changes_no_loss(hosts, training, undisturbed):
    if not FAKETIME.exists():
        pytest.skip("a host's own wall clock needs the package libfaketime")
    fast = (f'if [ "$RANK" = 1 ]; then export LD_PRELOAD={FAKETIME} FAKETIME=+3600; fi; '
            f'exec {{python}} -m megatron_vl "$@"')
    job = launch(hosts["desk"], ["one", "two"], "sh", "-c", fast.format(python=sys.executable),
                 "sh", *training.words(), options=ENVIRONMENT)
    ends(job, 0, "the clock of rank 1 (two) is 3600 s ahead of the others'")
    assert training.losses == undisturbed


def test_a_disk_that_is_full_on_one_host_fails_each_save_and_is_named(
        hosts, training, undisturbed):
    training.save.mkdir()
    hosts["two"].mount(training.save, "1m")
    job = training.start(hosts["desk"], ["one", "two"], train_iters=6)
    ends(job, 2, "NOT SAVED: iteration 5: rank 1 (two)", "[two] megatron-vl train: the last "
         "checkpoint, of iteration 6, could not be saved (rank 1 (two)")
    assert training.losses == {i: undisturbed[i] for i in range(1, 7)}


def test_hosts_that_disagree_about_the_latest_checkpoint_do_not_start(hosts, training, tmp_path):
    ends(training.start(hosts["desk"], ["one", "two"], train_iters=10), 0)
    other = tmp_path / "other"
    shutil.copytree(training.save, other)
    (other / "latest_checkpointed_iteration.txt").write_text("5\n")
    hosts["two"].run("mount", "--bind", other, training.save, check=True)
    ends(training.start(hosts["desk"], ["one", "two"]), 2,
         "the ranks do not agree: ", "latest_checkpointed_iteration.txt is ", "on rank 1 (two) but")
    assert (training.save / "latest_checkpointed_iteration.txt").read_text() == "10\n"
