"""How often a rank was asked to stop: one request may reach it by two ways."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

RANK = """
import os, pathlib, signal, sys, time
from megatron_vl.launch.stop import StopRequest
file, (name, asked, pauses) = pathlib.Path(sys.argv[1]), sys.argv[2:]
asked = asked == "True"
stop = StopRequest(file)
stop.listen()
if asked:
    file.write_text(name)
    assert stop.reason == name
for pause in pauses.split(","):
    time.sleep(float(pause))
    os.kill(os.getpid(), signal.Signals[name])
time.sleep(1.5 if name == "SIGTERM" and not asked else 0.5)
assert stop.reason == name
"""
ENDED = 128 + signal.SIGTERM
REQUESTS = {  # signal, whether the launcher was asked, seconds before each signal -> exit code
    "with the launcher": ("SIGTERM", True, "0", 0),
    "with the launcher, by SIGUSR1": ("SIGUSR1", True, "0", 0),
    "and again": ("SIGTERM", True, "0,0.2", ENDED),
    "later": ("SIGTERM", True, "1.5", ENDED),
    # So the launcher ends a rank after another one failed: there is nothing to save any more.
    "a rank alone": ("SIGTERM", False, "0", ENDED),
    "a rank alone, by SIGUSR1": ("SIGUSR1", False, "0", 0),
}


@pytest.mark.parametrize(("name", "asked", "pauses", "code"), REQUESTS.values(), ids=REQUESTS)
def test_one_request_by_two_ways_is_one_and_a_rank_alone_is_ended(
    name, asked, pauses, code, tmp_path
):
    words = [tmp_path / "stop", name, str(asked), pauses]
    done = subprocess.run([sys.executable, "-c", RANK, *words], timeout=60)
    assert done.returncode == code
