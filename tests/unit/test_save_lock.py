"""One run at a time writes to a SAVE."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from megatron_vl.errors import InputError
from megatron_vl.training.checkpoint import lock as save_lock

OTHER = """
import os, pathlib, sys, time
from megatron_vl.training.checkpoint.lock import hold
held = hold(pathlib.Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_told_who_writes_there(tmp_path, monkeypatch):
    save = tmp_path / "new" / "save"
    with subprocess.Popen([sys.executable, "-c", OTHER, save], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        monkeypatch.setattr(save_lock, "_HERE_SECONDS", 0.3)
        with pytest.raises(InputError) as refused:
            save_lock.hold(save)
        assert str(refused.value) == (
            f"{save} is being written by another run, process {other.pid} on "
            f"{socket.gethostname()}; end that one, or give another --save."
        )
        with pytest.raises(InputError, match=f"written by another run, process {other.pid}"):
            save_lock.check_free(save)
        # What it forked, as the processes that write, may end later.
        other.kill()
        monkeypatch.setattr(save_lock, "_HERE_SECONDS", 30)
        with save_lock.hold(save) as held:
            assert (save / ".lock").read_text() == f"{os.getpid()} on {socket.gethostname()}\n"
            assert held.fileno()
        save_lock.check_free(save)  # looks, and holds nothing
        assert (save / ".lock").read_text() == f"{os.getpid()} on {socket.gethostname()}\n"
        subprocess.run(["pkill", "-f", str(save)], check=False)


def test_looking_makes_nothing(tmp_path):
    save_lock.check_free(tmp_path / "save")
    assert not (tmp_path / "save").exists()
