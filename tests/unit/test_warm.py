"""A warm process is what `python` would have started, but for what it has imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from commands import ROOT, environment_with
from warm import start as warm

pytestmark = pytest.mark.skipif(not warm.possible(), reason="forks siblings on Linux x86-64 alone")

SAYS = """
import json, os, random, subprocess, sys, threading
print(json.dumps({
    "inherited": subprocess.run(["env"], capture_output=True, text=True).stdout,
    "parent": os.getppid(), "words": sys.argv, "directory": os.getcwd(), "first": sys.path[0],
    "variables": dict(os.environ), "warm": "megatron.core" in sys.modules,
    "threads": [threading.active_count(), len(os.listdir("/proc/self/task"))],
    "session": os.getsid(0), "group": os.getpgrp(), "random": random.random(), "name": __name__,
    "read": sys.stdin.read(), "open": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
}))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def program(tmp_path):
    """Write a program; returns the command that runs it."""

    def write(text: str) -> list[str]:
        (tmp_path / "program.py").write_text(text)
        return [sys.executable, str(tmp_path / "program.py"), "a", "b c"]

    return write


def said(command, **options) -> dict:
    done = subprocess.run(
        command, capture_output=True, text=True, input="given", **options,
        env=environment_with(HERE="this one"), cwd="/",
    )
    assert (done.returncode, done.stderr) == (7, "to stderr\n")
    return json.loads(done.stdout)


def test_a_warm_process_is_started_as_a_cold_one_is(program):
    command = program(SAYS)
    found = said(command)
    warm.use(None)
    cold = said(command)
    assert found.pop("warm") and not cold.pop("warm")
    assert found.pop("random") != cold.pop("random")
    assert found["parent"] == os.getpid() and found["read"] == "given"
    # It can start others, by a socket of its own.
    assert found.pop("open") == [*cold.pop("open"), 3]
    assert found == cold


def test_every_process_draws_its_own_random_numbers(program):
    command = program(SAYS)
    assert said(command)["random"] != said(command)["random"]


def test_a_session_of_its_own_is_given(program):
    assert said(program(SAYS), start_new_session=True)["session"] not in (0, os.getsid(0))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGINT"])
def test_a_signal_ends_a_warm_process_and_is_its_code(name, program):
    job = subprocess.Popen(
        program("import time\nprint('ready', flush=True)\ntime.sleep(60)"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.Signals[name])
    assert job.wait(timeout=30) == -signal.Signals[name]
    assert job.stdout.read() == ""


ENDS = {  # how a program ends -> its code, and the last of what it says
    "well": ("pass", 0, ""),
    "with a sentence": ("raise SystemExit('no data')", 1, "no data"),
    "badly": ("raise KeyError(3)", 1, "KeyError: 3"),
    "behind its exit handlers": (
        "import atexit, sys\natexit.register(lambda: print('last', file=sys.stderr))", 0, "last"),
    "with its threads": (
        "import threading, time\ndef late():\n    time.sleep(0.2)\n    import sys\n"
        "    print('late', file=sys.stderr)\nthreading.Thread(target=late).start()", 0, "late"),
}


@pytest.mark.parametrize(("text", "code", "last"), ENDS.values(), ids=ENDS)
def test_a_warm_process_ends_as_a_cold_one_does(text, code, last, program):
    done = subprocess.run(program(text), capture_output=True, text=True)
    assert done.returncode == code
    assert (done.stderr.splitlines() or [""])[-1] == last


LAUNCHES = """
import os, subprocess, sys, time
rank = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
open("rank.py", "w").write(rank)
subprocess.Popen([sys.executable, "rank.py"], env={**os.environ, "RANK": "3"})
time.sleep(60)
"""


def test_what_a_warm_process_starts_is_its_child_and_warm_too(program, tmp_path):
    job = psutil.Popen(program(LAUNCHES), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        rank = psutil.Process(int(job.stdout.readline()))
        assert rank.ppid() == job.pid
        assert rank.cmdline()[:2] == [sys.executable, "rank.py"] and rank.environ()["RANK"] == "3"
        assert "torch" in " ".join(one.path for one in rank.memory_maps())
    finally:
        for one in (rank, job):
            one.kill()
        job.wait()
    deadline = time.monotonic() + 10  # its nursery ends with it
    while any(one.ppid() == job.pid for one in psutil.process_iter()):
        assert time.monotonic() < deadline


def test_what_torchrun_starts_says_at_once_what_it_has_to_say(program):
    python, *words = program("import sys, time\nprint('here', end='')\ntime.sleep(60)")
    with subprocess.Popen([python, "-u", *words], stdout=subprocess.PIPE) as job:
        assert job.stdout.read(4) == b"here"
        job.kill()


COLD = {
    "code in the command": ["-c", "import sys; print('torch' in sys.modules)"],
    "an option of the interpreter": ["-X", "utf8", "program.py"],
}


@pytest.mark.parametrize("words", COLD.values(), ids=COLD)
def test_what_is_about_imports_starts_cold(words, program, tmp_path):
    program("import sys; print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_a_program_with_a_sitecustomize_starts_cold(program, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.customized = True\n")
    env = environment_with(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    command = program("import sys; print(customized, 'torch' in sys.modules)")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "True False\n"


@pytest.mark.cold
def test_a_case_marked_cold_starts_everything_as_a_user_does(program):
    assert not said(program(SAYS))["warm"]
