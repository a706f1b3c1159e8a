"""SAVE on shared storage: what one client has written, and another does not see yet."""

from __future__ import annotations

import subprocess
import sys

import pytest
from commands import environment_with
from hosts import storage

from megatron_vl.errors import InputError
from megatron_vl.training.checkpoint import lock as save_lock
from megatron_vl.training.checkpoint.files import candidates, folder
from megatron_vl.weights.found import LATEST, iterations

pytestmark = pytest.mark.skipif(bool(storage.why_not()), reason=storage.why_not() or "runs")
STALE = 30
FAILED = r"b/save/\.lock, by which .* cannot be locked \(Input/output error\); see whether"
HOLD = """
import pathlib, sys
from megatron_vl.training.checkpoint.lock import hold
held = hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def clients(tmp_path):
    """Two clients, and the server's `tell`."""
    server = storage.Storage(tmp_path)
    with (server.mounted(tmp_path / "a", STALE) as one,
          server.mounted(tmp_path / "b", STALE) as two):
        yield one, two, server.tell


def test_a_lock_that_another_client_holds_is_told_with_its_holder(clients, monkeypatch):
    one, two, _ = clients
    monkeypatch.setattr(save_lock, "_HERE_SECONDS", 0.3)
    with subprocess.Popen([sys.executable, "-c", HOLD, one / "save"], env=environment_with(),
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=rf"written by another run, process {other.pid} on "):
            save_lock.hold(two / "save")
        other.kill()
    with save_lock.hold(two / "save"):
        pass


@pytest.mark.parametrize(("state", "found"), [
    ({"locks": False}, None),
    ({"broken": "lock"}, FAILED),
    ({"broken": "open"}, FAILED),
])
def test_a_file_system_without_locks_is_not_one_that_fails(clients, state, found):
    one, two, tell = clients
    (one / "save").mkdir()
    (one / "save" / ".lock").touch()
    tell(**state)
    if found is None:
        assert save_lock.hold(two / "save") is None
    else:
        with pytest.raises(InputError, match=found):
            save_lock.hold(two / "save")


def test_a_checkpoint_that_the_listing_lacks_is_found_by_its_name(clients):
    one, two, _ = clients
    folder(one, 10).mkdir()
    assert iterations(two) == [10]
    folder(one, 20).mkdir()
    (one / LATEST).write_text("20\n")
    assert iterations(two) == [10], "the listing is an old one"
    assert candidates(two) == [folder(two, 20), folder(two, 10)]
    (one / LATEST).write_text("30\n")
    with pytest.raises(InputError, match="says '30' but"):
        candidates(one)
