"""What a run that hung left behind, and whom it may signal."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess

from megatron_vl.training.resilience.hang import _delete_if_empty, _set_aside, _takes


def test_the_stacks_of_an_earlier_start_are_kept(tmp_path):
    folder = tmp_path / "stacks"
    _set_aside(folder)
    (folder / "rank00000.txt").write_text("Thread 1\n")
    (folder / "rank00001.txt").write_text("")
    os.utime(folder / "rank00000.txt", (1e9, 1e9))
    _set_aside(folder)
    (kept,) = folder.rglob("*.txt")
    assert kept.read_text() == "Thread 1\n" and kept.parent.parent == folder
    assert kept.parent.name.startswith("2001-09-")
    _set_aside(folder)
    assert list(folder.rglob("*.txt")) == [kept]


def test_what_two_runs_share_is_tidied_up_by_either(tmp_path):
    folder = tmp_path / "stacks"
    folder.mkdir()
    (folder / "rank00000.txt").write_text("")
    (folder / "rank00001.txt").write_text("Thread 1\n")
    for _ in range(2):
        _delete_if_empty(folder / "rank00000.txt")
        _delete_if_empty(folder / "rank00001.txt")
        _delete_if_empty(folder)
    assert [one.name for one in folder.iterdir()] == ["rank00001.txt"]
    (folder / "rank00001.txt").write_text("")
    for _ in range(2):
        _delete_if_empty(folder / "rank00001.txt")
        _delete_if_empty(folder)
    assert not folder.exists()


def test_a_process_that_has_no_handler_is_not_signalled(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as other, (tmp_path / "stacks").open("w") as file:
        assert not _takes(other.pid, signal.SIGUSR2)
        assert not _takes(os.getpid(), signal.SIGUSR2)
        faulthandler.register(signal.SIGUSR2, file=file)
        assert _takes(os.getpid(), signal.SIGUSR2)
        faulthandler.unregister(signal.SIGUSR2)
        other.kill()
    assert not _takes(other.pid, signal.SIGUSR2), "it has ended"
