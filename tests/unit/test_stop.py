"""How often a rank was asked to stop: one request may reach it by two ways."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

RANK = """
import os, pathlib, signal, sys, time
from megatron_vl.training.stop import StopRequest
file = pathlib.Path(sys.argv[1])
stop = StopRequest(file)
stop.listen()
file.write_text("SIGTERM")
assert stop.reason == "SIGTERM"
for pause in sys.argv[2].split(","):
    time.sleep(float(pause))
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.5)
"""


@pytest.mark.parametrize(("pauses", "code"), {
    "with the launcher": ("0", 0), "and again": ("0,0.2", 128 + signal.SIGTERM),
    "later": ("1.5", 128 + signal.SIGTERM),
}.values(), ids=str)
def test_the_signal_that_comes_with_the_launchers_is_no_second_one(pauses, code, tmp_path):
    done = subprocess.run([sys.executable, "-c", RANK, tmp_path / "stop", pauses], timeout=60)
    assert done.returncode == code
