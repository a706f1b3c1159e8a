"""How a job's end is told: what its ranks reported, how they exited, and who asked them to stop.

`tests/distributed/test_launch.py` ends real ones.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from commands import environment_with
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_vl.launch.launcher import _stopping, end_of
from megatron_vl.launch.stop import AGAIN
from megatron_vl.launch.worker import FAILURE_FILE, STEPPED, STOP, fail, read_failure

NO_DATA = "megatron-vl train: no data; give some."
BROKE = "Traceback\nKeyError: 3\n"
KILLED, CRASHED, ENDED = -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGTERM


def failed(exits: dict[int, int]) -> ChildFailedError:
    """What torch's launcher raises for ranks with these exit codes."""
    return ChildFailedError("train", {
        rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="")
        for rank, code in exits.items()
    })


ENDINGS = {  # reports as (rank, code, message), exit codes by rank -> code and message of the job
    "bad input on every rank": (
        [(0, 2, NO_DATA), (1, 2, NO_DATA)], {0: 2, 1: 2}, 2, f"{NO_DATA}\n"),
    "bad input on the rank that is last to end": ([(1, 2, NO_DATA)], {0: 1}, 2, f"{NO_DATA}\n"),
    "something broke": ([(1, 1, BROKE)], {1: 1, 0: ENDED}, 1, f"rank 1 failed:\n{BROKE}"),
    "something broke, and another rank for it": (
        [(1, 1, BROKE), (0, 1, "closed")], {0: 1, 1: 1}, 1, f"rank 1 failed:\n{BROKE}"),
    "killed, and another rank broke for it": (
        [(0, 1, "closed")], {1: KILLED, 0: 1}, 1, "rank 0 failed:\nclosed\n"),
    "killed": (
        [], {1: KILLED}, 1, "megatron-vl train: rank 1 was ended by SIGKILL; the machine may have "
                            "run out of memory.\n"),
    "crashed": ([], {1: CRASHED}, 1, "megatron-vl train: rank 1 was ended by SIGSEGV.\n"),
    "no message": ([], {1: 7}, 1, "megatron-vl train: rank 1 ended with code 7 and no message.\n"),
}


@pytest.mark.parametrize(
    ("reports", "exits", "code", "message"), ENDINGS.values(), ids=ENDINGS
)
def test_a_job_ends_with_one_message_and_its_code(
    reports, exits, code, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv(FAILURE_FILE, str(tmp_path / "failure"))
    for rank, its_code, report in reports:
        monkeypatch.setenv("RANK", str(rank))
        assert fail(its_code, report) == its_code
    end = end_of(failed(exits), tmp_path / "failure", "train")
    assert (end.code, end.report) == (code, message)
    assert capsys.readouterr() == ("", ""), "the launcher prints it, once"


@pytest.mark.parametrize(("done", "hopeful", "final"), [
    ((), False, False), ((STEPPED,), True, False), ((STOP,), False, True),
    ((STEPPED, STOP), True, True),
], ids=str)
def test_what_was_done_before_is_seen_beside_the_report(done, hopeful, final, tmp_path):
    for name in done:
        (tmp_path / name).touch()
    end = end_of(failed({1: 1, 0: ENDED}), tmp_path / "failure", "train")
    assert (end.hopeful, end.final) == (hopeful, final)
    assert end_of(failed({0: KILLED}), tmp_path / "failure", "train").hopeful, "whatever was done"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_first_signal_asks_ranks_to_save_and_the_second_ends_them(name, tmp_path, capfd):
    number, file = signal.Signals[name], tmp_path / STOP
    before = signal.getsignal(number)
    with _stopping(file, "train"):
        signal.raise_signal(number)
        assert file.read_text() == name and not (tmp_path / AGAIN).exists()
        with pytest.raises(SignalException) as ended:
            signal.raise_signal(number)
        assert ended.value.sigval == number and (tmp_path / AGAIN).exists()
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err == (
        f"megatron-vl train: {name}: saving after this step, then stopping; a second signal ends "
        f"the run at once\n"
    )


CLAIM = """
import sys, time
from pathlib import Path
import os
from megatron_vl.launch.worker import FAILURE_FILE, fail
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
            env=environment_with(RANK=rank),
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
def test_a_rank_without_our_launcher_speaks_itself(where, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv(FAILURE_FILE, raising=False)
    if where:
        monkeypatch.setenv(FAILURE_FILE, str(tmp_path / where))
    assert (fail(1, "KeyError: 3"), fail(2, "no data")) == (1, 2)
    assert capsys.readouterr() == ("", "rank 3 failed:\nKeyError: 3\nno data\n")
