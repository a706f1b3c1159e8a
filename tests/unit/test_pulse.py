"""Launchers on a real store notice which of them fell silent; a stopped process is a host that is
gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from megatron_vl.launch.pulse import Pulse

HOSTS = ["zero", "one", "two"]
NODE = """
import sys
from types import SimpleNamespace
from torch.distributed import TCPStore
from megatron_vl.launch.pulse import Pulse
node, port = map(int, sys.argv[1:])
store = SimpleNamespace(host="127.0.0.1", port=port)
if node == 0:
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
with Pulse(store, 0, node_rank=node, hosts=["zero", "one", "two"], say=print, beat_seconds=0.1):
    print(store.port, flush=True)
    sys.stdin.read()
"""

LEAVING = """
import os, signal, sys, time
from types import SimpleNamespace
from megatron_vl.cli import main
from megatron_vl.launch.pulse import Pulse
port, node_0 = map(int, sys.argv[1:3])

class Late:
    def __del__(self, go_on=os.kill, number=signal.SIGCONT, sleep=time.sleep):
        go_on(node_0, number)  # as Python ends, where this object is still there by then
        sleep(1)

def run(argv):
    with Pulse(store, 0, node_rank=1, hosts=["zero", "one"], say=print, beat_seconds=0.1):
        time.sleep(1)
        os.kill(node_0, signal.SIGSTOP)
        time.sleep(1)
    return int(argv[0])

store, late, main.run = SimpleNamespace(host="127.0.0.1", port=port), Late(), run
main.main(sys.argv[3:])
"""


class Listener(list):
    """What one node says, and its part in the attempt."""

    def __init__(self, store, node: int, attempt: int = 0):
        super().__init__()
        self.pulse = Pulse(store, attempt, node_rank=node, hosts=HOSTS, say=self.append,
                           beat_seconds=0.05, quiet_seconds=0.6)

    def wait_for(self, number: int) -> None:
        left = time.monotonic() + 30
        while len(self) < number:
            assert time.monotonic() < left, self
            time.sleep(0.02)


def start(node: int, port: int) -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen([sys.executable, "-c", NODE, str(node), str(port)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process, int(process.stdout.readline())


@contextlib.contextmanager
def stopped(process: subprocess.Popen):
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


def test_node_0_names_who_is_silent_and_who_is_heard_again(store):
    one, _ = start(1, store.port)
    two, _ = start(2, store.port)
    said = Listener(store, 0)
    with said.pulse:
        with stopped(two):
            said.wait_for(1)
        said.wait_for(2)
        one.communicate()
        time.sleep(1)  # longer than one may be silent that takes part
        two.kill()
        said.wait_for(3)
    two.communicate()
    assert said[0].startswith("node 2 (two) has been silent for 1 s; see that the host is up")
    assert said[1].startswith("node 2 (two) is heard again, after ")
    assert said[2].startswith("node 2 (two) has been silent for 1 s"), "a killed launcher's"
    assert len(said) == 3, "one has left in order"


def test_the_others_name_node_0_and_end_though_it_answers_nothing():
    zero, port = start(0, 0)
    said = Listener(SimpleNamespace(host="127.0.0.1", port=port), 1)
    with said.pulse:
        time.sleep(0.3)
        with stopped(zero):
            said.wait_for(1)
        said.wait_for(2)
        os.kill(zero.pid, signal.SIGSTOP)
        said.wait_for(3)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    zero.kill()
    zero.communicate()
    assert [line.split(" has been")[0].split(", after")[0] for line in said] == [
        "node 0 (zero)", "node 0 (zero) is heard again", "node 0 (zero)"]


@pytest.mark.parametrize(("word", "code", "said"), [
    ("7", 7, ""),
    ("a mistake", 1, "ValueError: invalid literal for int() with base 10: 'a mistake'"),
])
def test_an_answer_that_comes_while_python_ends_aborts_no_launcher(word, code, said):
    zero, port = start(0, 0)
    left = subprocess.run([sys.executable, "-c", LEAVING, str(port), str(zero.pid), word],
                          text=True, capture_output=True, timeout=60)
    zero.kill()
    zero.communicate()
    assert (left.returncode, left.stderr.strip().rpartition("\n")[2]) == (code, said)


def test_a_node_0_that_has_ended_is_not_called_silent(capfd):
    zero, port = start(0, 0)
    said = Listener(SimpleNamespace(host="127.0.0.1", port=port), 1)
    with said.pulse:
        time.sleep(0.3)
        zero.communicate()
        time.sleep(1)
    assert said == [] and "Traceback" not in capfd.readouterr().err


def test_attempts_do_not_hear_one_another(store):
    """A node that is still in the attempt before has not come to this one."""
    before, said = Listener(store, 1, attempt=0), Listener(store, 0, attempt=1)
    with before.pulse, said.pulse:
        said.wait_for(2)
    assert {line.split(" has")[0] for line in said} == {"node 1 (one)", "node 2 (two)"}
