"""The shadow device refuses and counts what its users rely on it to, and is an NPU to the platform:
see shadow/rows.py."""

from __future__ import annotations

import json
import sys

import pytest
from commands import ROOT, run
from shadow.rows import GIVES, REFUSED, SAYS, WAITS

from megatron_vl.errors import InputError
from megatron_vl.platform import select_platform

SITE = ROOT / "tests" / "shadow" / "site"


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


@pytest.mark.parametrize("name", GIVES)
def test_megatron_core_and_the_platform_find_an_npu(name, found):
    expected, _ = GIVES[name]
    assert found[name] == expected


@pytest.mark.parametrize("name", SAYS)
def test_what_cannot_run_on_npus_is_said_in_one_sentence(name, found):
    expected, _ = SAYS[name]
    assert found[name].startswith(expected)
    assert found[name].count(". ") == 0


def test_a_torch_npu_that_cannot_be_loaded_never_becomes_the_cpu_in_silence(monkeypatch):
    monkeypatch.syspath_prepend(SITE)
    monkeypatch.setenv("SHADOW_NPU", "broken")
    with pytest.raises(InputError, match="torch_npu .* cannot be loaded .libhccl.so: .*set_env.sh"):
        select_platform()
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")
    assert select_platform().name == "cpu"
