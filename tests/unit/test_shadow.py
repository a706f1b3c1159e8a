"""The shadow device refuses and counts what its users rely on it to: see shadow/rows.py."""

from __future__ import annotations

import json
import sys

import pytest
from commands import ROOT, run
from shadow.rows import REFUSED, WAITS


@pytest.fixture(scope="module")
def found() -> dict:
    done = run([sys.executable, ROOT / "tests" / "shadow" / "rows.py"])
    assert done.code == 0, done.text
    return json.loads(done.out)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_accelerator_can_do_is_refused(name, found):
    assert found[name].startswith("refused"), found[name]


@pytest.mark.parametrize("name", WAITS)
def test_each_wait_of_the_host_is_counted(name, found):
    count, _ = WAITS[name]
    assert found[name] == count
