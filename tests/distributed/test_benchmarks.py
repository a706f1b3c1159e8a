"""Every script of toolkits/benchmarks starts, runs to its end and prints its table; no time counts.

precision.py has tests/distributed/test_precision.py.
"""

from __future__ import annotations

import re
import sys

import pytest
from commands import ROOT, run


def predicted(lines: int, off: str = "0") -> str:
    """A table of so many lines, each of whose ranks is predicted within a twentieth."""
    return (rf"\A\| training .*\n\|[-|]+\n(\| .+ \| [\d.]+ \| {off} \| [\d.]+ \| [\d.]+ \| "
            rf"((0\.9[5-9]|1\.0[0-5]) )+\| [\d.]+ \|\n){{{lines}}}\Z")


# What follows the script (M model, E one with experts, D data, T a new directory), its last table.
SCRIPTS = {
    "train_step.py": (
        "M D --rows 2 --micro-batch-size 1 --steps 1 --seq-length 256 --lora-rank 2",
        r"^ours, all weights +[\d.]+ +[\d,]+.*\n(ratio of tokens/s, ours to .*\n?){3}",
    ),
    "convert.py": (
        "--model-size tiny --repeat 1 --work T",
        r"^cp -r mcore .*\n((convert to \w+|cp -r hf) .*\n){3}(naive to \w+ .*\n?){2}",
    ),
    "load.py": (
        "--model-size tiny --repeat 1 --tp 1 --pp 2 --quantize-base nf4 --work T",
        r"^parameters of a rank +\d+ MiB\nmemory above parameters +\d+ MiB$",
    ),
    "data.py": (
        "M D --samples 20 --rounds 1 --seq-length 256 --memory-samples 20",
        r"^loader / floor +[\d.]+$",
    ),
    "memory.py": ("M --steps 1 --seq-length 256 --lines 1", r"^first losses: [\d.]+$"),
    "predicted_memory.py": ("M --seq-length 256 --ranks 1 --only recompute", predicted(9)),
    "predicted_memory.py, virtual stages": (
        "M --seq-length 256 --ranks 2 --only VP2", predicted(2),
    ),
    # Shares of the distributed optimizer end with padding, which has no state.
    "predicted_memory.py, experts": (
        "E --seq-length 256 --ranks 2 --only EP2", predicted(4, off="(0|3,072)"),
    ),
    "traced_memory.py": (
        "M E --draws 3 --seed 3 --seq-length 256 --world 8 --tolerance 0.05",
        r"^(\| \w+ \| \d \| \d \| --seq-length 256 .+ \| [\d.]+ \| (0\.9[5-9]|1\.0[0-5])\d \| "
        r"\d+ \|\n){3}\n3 of 3 ranks within 5%; \d+ layouts .*",
    ),
    "plan_schedule.py": (
        "--stages 2", r"^(\| .+ \| [\d.]+ \| [\d.]+ \| [+-][\d.]+% to [+-][\d.]+% \|\n?){9}$",
    ),
    "plan_time.py": (
        "T --rounds 1 --steps 1 --seq-length 64",
        r"^(\| text \| .+( \| [\d.]+){2} \| [a-z\d.]+ \| \+\d+% \|\n){10}\n\d of 7 steps .*",
    ),
    "soak.py": (
        "M D T/runs --minutes 0.25 --every 3 --faults kill_every_rank",
        r"^losses equal to an undisturbed run's, to the bit +yes\nsurvived +yes$",
    ),
    "soak.py, hosts": (
        "M D T/runs --hosts 2 --minutes 0.25 --every 3 --faults kill_every_rank",
        r"^losses equal to an undisturbed run's, to the bit +yes\nsurvived +yes$",
    ),
}
OVER_HOSTS = {"soak.py, hosts"}


def test_every_script_is_started():
    scripts = {path.name for path in (ROOT / "toolkits/benchmarks").glob("*.py")
               if "__main__" in path.read_text()}
    assert scripts == {*(name.partition(",")[0] for name in SCRIPTS), "precision.py"}


@pytest.mark.parametrize("script", [
    pytest.param(script, marks=[pytest.mark.hosts] * (script in OVER_HOSTS)) for script in SCRIPTS
])
def test_a_benchmark_prints_its_table(script, model_dir, experts_model_dir, wds_dir, tmp_path):
    words, table = SCRIPTS[script]
    places = {"M": model_dir, "E": experts_model_dir, "D": wds_dir}
    words = [places.get(word) or re.sub("^T", str(tmp_path), word) for word in words.split()]
    done = run([sys.executable, ROOT / "toolkits/benchmarks" / script.partition(",")[0], *words])
    assert done.code == 0, done.text
    assert re.search(table, done.out, re.M), done.text
