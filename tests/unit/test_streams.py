"""What a process prints to a full disk."""

from __future__ import annotations

import subprocess
import sys

SAYS = """
import sys
from megatron_vl.cli.streams import outlast_full_disks
outlast_full_disks()
print("first", flush=True)
input()
for number in range(1000):
    print("line", number, "x" * 100, flush=True)
print("to stderr", file=sys.stderr)
print("ready", file=open(sys.argv[1], "w"), flush=True)
input()
print("last", flush=True)
"""


def test_a_full_disk_takes_lines_and_says_so_when_there_is_room_again(small_disk, tmp_path):
    ready = tmp_path / "ready"
    with (small_disk / "log").open("w") as log, subprocess.Popen(
        [sys.executable, "-c", SAYS, ready], stdin=subprocess.PIPE, stdout=log, stderr=log,
        text=True,
    ) as job:
        filler = small_disk / "filler"
        while "first" not in (small_disk / "log").read_text():
            assert job.poll() is None
        try:
            with filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
        except OSError:
            pass
        job.stdin.write("\n")
        job.stdin.flush()
        while not ready.exists() or not ready.read_text():
            assert job.poll() is None
        filler.unlink()
        job.stdin.write("\n")
        job.stdin.flush()
        assert job.wait(timeout=60) == 0
    lines = (small_disk / "log").read_text().splitlines()
    assert lines[0] == "first" and lines[-1] == "last"
    (told,) = [line for line in lines if "[the disk was full: up to" in line]
    assert "lines are missing here]" in told


def test_a_disk_that_stays_full_ends_nothing():
    program = SAYS.replace("input()", "")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, "/dev/null"], stdout=full, stderr=full
        )
    # Python itself says by this code that the rest could not be written at its end.
    assert done.returncode in (0, 120)
