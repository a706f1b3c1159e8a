"""The faults that tests/mutants.sh makes are still faults of the files as they are."""

from __future__ import annotations

import subprocess

import pytest
from commands import ROOT

LINES = (ROOT / "tests/mutants.txt").read_text(encoding="utf-8").split("\n")
BLOCKS = "\n".join(line for line in LINES if not line.startswith("#")).strip().split("\n\n")
FAULTS = {name: rest for name, *rest in (block.split("\n") for block in BLOCKS)}


def test_no_two_faults_have_one_name():
    assert len(FAULTS) == len(BLOCKS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_its_file_and_its_test_is_there(name):
    file, expression, test = FAULTS[name]
    before = (ROOT / file).read_text(encoding="utf-8")
    done = subprocess.run(["sed", expression, ROOT / file], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout != before, done.stderr
    path, _, function = test.partition("::")
    function = function.partition("[")[0]
    assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8") if function else True
