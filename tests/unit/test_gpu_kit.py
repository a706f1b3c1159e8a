"""The kit for GPU machines, whole and tiny on the CPU, so that it runs when a card is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import astuple
from pathlib import Path

import pytest

from megatron_vl.planner.cards import CARDS, calibrated
from megatron_vl.planner.rates import UNMEASURED

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "toolkits" / "gpu"


@pytest.fixture
def kit(monkeypatch):
    """The kit's scripts import one another by their folder."""
    monkeypatch.syspath_prepend(KIT)
    names = {path.stem for path in KIT.glob("*.py")}
    yield
    for name in names & set(sys.modules):
        if getattr(sys.modules[name], "__file__", "").startswith(str(KIT)):
            del sys.modules[name]


@pytest.mark.xdist_group("gpu_kit")
def test_every_step_runs_tiny_on_a_cpu_and_its_tables_are_on_the_page(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", KIT / "check.sh", out, "--device", "cpu", "--tiny", "--pack"],
        capture_output=True, text=True, env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr[:3000]
    assert "nothing failed" in done.stdout
    found = json.loads((out / "results.json").read_text())
    steps = {one["step"]: one["outcome"] for one in found["steps"]}
    assert set(steps.values()) == {"ok"} and set(steps) == set(found["results"])
    assert {"card", "probe", "links", "kernels", "tests", "parity-float32", "resume", "train-trace",
            "transformers-padded", "transformers-packed"} == set(steps)
    text, page = (out / "gpu.md").read_text(), (out / "gpu.html").read_text()
    for title in ("Measured ceilings", "Attention", "Links", "Kernels", "Tests marked gpu",
                  "Parity with transformers", "Resuming and precision", "Training",
                  "Kernels by time", "transformers"):
        assert f"\n## {title}\n" in text and f"<h2>{title}</h2>" in page
    assert "equal to the bit" in text
    padded, packed = (found["results"][f"transformers-{way}"]["tables"]["transformers"]["rows"][0]
                      for way in ("padded", "packed"))
    assert padded["first loss"] == pytest.approx(packed["first loss"], rel=2e-3)
    files = {path.name for path in out.iterdir() if path.is_file()}
    assert files == {"gpu.md", "gpu.html", "gpu.json", "results.json", "logs.tar.gz",
                     "trace.json.gz"}
    rates = calibrated(CARDS["h200"], out / "gpu.json").rates
    assert rates.products and rates.memory and rates.attention and rates.attention_backward
    assert all(len(points) == 2 for points in astuple(rates.node)) and rates.network == UNMEASURED


@pytest.mark.xdist_group("gpu_kit")
def test_an_npu_is_measured_by_the_same_steps(tmp_path):
    """On the shadow device: a torch_npu that computes on the CPU."""
    done = subprocess.run(
        ["bash", KIT / "check.sh", tmp_path / "out", "--device", "npu", "--tiny", "--only", "probe",
         "--inputs", tmp_path], capture_output=True, text=True,
        env=environment() | {"PYTHONPATH": str(ROOT / "tests" / "shadow" / "site")},
    )
    assert done.returncode == 0, done.stdout + done.stderr[:3000]
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    card = found["card"]["facts"]
    assert card["device"] == "Ascend910B2" and card["memory_gib"] > 0 and card["sheet_tflops"]
    assert found["probe"]["facts"]["matmul_tflops"] > 0 and not found["probe"]["failed"]
    assert "| CANN |" in (tmp_path / "out" / "gpu.md").read_text()


def test_a_machine_without_cann_ends_before_the_first_step(tmp_path):
    site = {"PYTHONPATH": str(ROOT / "tests" / "shadow" / "site"), "SHADOW_NPU": "broken"}
    done = subprocess.run(["bash", KIT / "check.sh", tmp_path / "out", "--device", "npu"],
                          capture_output=True, text=True, env=environment() | site)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("check.sh: torch_npu 0 is installed but cannot load CANN (libhc")
    assert not (tmp_path / "out").exists()


def test_a_step_sees_one_device_of_the_kind_that_was_asked_for(kit):
    from device import one_of, platform_of

    npus = {"ASCEND_RT_VISIBLE_DEVICES": "4,5"}
    for device, environ, cuda, ascend in (
        ("cuda", {}, "0", ""), ("cuda", {"CUDA_VISIBLE_DEVICES": "2,3"} | npus, "2", ""),
        ("npu", npus, "", "4"), ("npu", {}, "", "0"), ("cpu", npus, "", ""),
    ):
        assert one_of(device, environ) == {
            "CUDA_VISIBLE_DEVICES": cuda, "ASCEND_RT_VISIBLE_DEVICES": ascend}
    with pytest.raises(SystemExit, match="--device npu: this machine's is cpu"):
        platform_of("npu")


def environment() -> dict:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def test_what_does_not_fit_is_left_out_the_least_important_first(kit):
    from check import Step, cost, fitting

    def step(name, seconds, rank, group=""):
        return Step(name=name, seconds=seconds, limit=99, rank=rank, group=group)

    steps = [step("a", 10, 0), step("b", 30, 1, "beside"), step("c", 20, 1, "beside"),
             step("d", 50, 2), step("e", 20, 3)]
    assert cost(steps) == 10 + 30 + 50 + 20
    for seconds, expected in ((None, "abcde"), (110, "abcde"), (95, "abcd"), (60, "abce"),
                              (40, "abc"), (35, "ac"), (5, "")):
        assert "".join(one.name for one in fitting(steps, seconds)) == expected


def test_a_step_that_fails_or_hangs_is_told_and_stops_no_other(kit, tmp_path, monkeypatch):
    from check import Check, Step

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    sees = "import os; raise SystemExit(os.environ['CUDA_VISIBLE_DEVICES'] != '{}')"
    scripts = {"fails": "raise SystemExit(3)", "hangs": "import time; time.sleep(60)",
               "one card": sees.format("2"), "all cards": sees.format("2,3")}
    for name, line in scripts.items():
        (tmp_path / f"{name}.py").write_text(line)
    check = Check(Namespace(out=tmp_path / "out", pack=False, minutes=None, device="cuda"),
                  tmp_path)
    check.run_group([
        Step(name=name, seconds=1, limit=1 if name == "hangs" else 60, rank=1,
             words=[tmp_path / f"{name}.py"], all_devices=name == "all cards") for name in scripts
    ])
    assert {name: one["outcome"] for name, one in check.status.items()} == {
        "fails": "failed with exit code 3", "hangs": "ended after its limit of 1 s",
        "one card": "ok", "all cards": "ok"}
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "| fails: failed with exit code 3 |" in text and "| hangs: ended after" in text


def test_only_what_is_reached_without_what_is_there_is_carried(kit):
    from wheels import missing

    def package(name, *requires):
        return {"metadata": {"name": name, "version": "1.0", "requires_dist": list(requires)}}

    report = {"install": [
        package("Mine", "torch>=2", "small_part; python_version >= '3.12'", "old; extra == 'x'",
                "s3fs"),
        package("torch", "nvidia-cublas"), package("small.part", "cffi"), package("cffi"),
        package("nvidia-cublas"), package("s3fs"), package("old"),
    ]}
    assert missing(report, ["mine"], {"torch"}, "3.12") == [
        "cffi==1.0", "mine==1.0", "small-part==1.0"
    ]
    assert missing(report, ["mine[x]"], {"torch"}, "3.11") == ["mine==1.0", "old==1.0"]
