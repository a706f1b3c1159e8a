"""Work shared out to real processes, killed with real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from test_convert_bad_input import hf, mcore  # noqa: F401  (fixtures)
from tiny_hf import ROOT, assert_equal, read

from megatron_vl.cli.main import run
from megatron_vl.errors import InputError
from megatron_vl.weights import reshard
from megatron_vl.workers import in_parallel


def test_answers_come_in_order_from_other_processes():
    def work(item):
        time.sleep(0.05 * (item == 0))
        return item, os.getpid()

    answers = list(in_parallel(work, range(20), 2))
    assert [item for item, _ in answers] == list(range(20))
    assert len({pid for _, pid in answers}) == 2 and os.getpid() not in dict(answers).values()
    assert list(in_parallel(work, [3], 4)) == [(3, os.getpid())]


def test_an_error_in_a_worker_is_the_callers():
    def work(item):
        if item == 3:
            raise InputError("the fourth is bad.")

    with pytest.raises(InputError, match="the fourth is bad"):
        list(in_parallel(work, range(100), 2))
    assert list(in_parallel(str, range(3), 2)) == ["0", "1", "2"]  # and the next call works


def test_a_worker_that_is_killed_is_one_sentence():
    with pytest.raises(InputError, match="a worker process was killed"):
        list(in_parallel(lambda item: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(sent):
    code = """
import os, time
from megatron_vl.workers import in_parallel
def work(item):
    os.write(1, b'%d\\n' % os.getpid())
    time.sleep(2 if item < 2 else 60)
list(in_parallel(work, range(2 if os.environ['SENT'] == '2' else 4), 2))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, env={**os.environ, "SENT": str(int(sent))})
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.send_signal(sent)
    parent.wait(20)
    deadline = time.monotonic() + 10
    while any(_lives(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_conversion_shared_out_is_the_same(hf, mcore, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(reshard, "SHARED", 0)
    monkeypatch.setattr(reshard, "SPAN", 30_000)
    assert run(["convert", str(mcore), str(tmp_path / "back"), "--workers", "3", "--verify"]) == 0
    assert_equal(read(tmp_path / "back"), read(hf))
    (source,) = (tmp_path / "back").glob("*.safetensors")
    with source.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x80\x7f")  # an infinity in the last tensor
    capsys.readouterr()
    assert run(["convert", str(tmp_path / "back"), str(tmp_path / "m"), "--workers", "2"]) == 0
    assert "warning: 1 NaN or Inf in 1 tensor(s)" in capsys.readouterr().out
    assert run(["verify", str(mcore), str(tmp_path / "m"), "--workers", "2"]) == 1
    assert "inf" in capsys.readouterr().out
