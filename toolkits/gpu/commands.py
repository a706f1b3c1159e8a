"""The project's own checks on this device, as rows: `megatron-vl parity` and `pytest -m gpu`.

    python commands.py RESULT.json parity INPUTS [float32|bfloat16]
    python commands.py RESULT.json tests [pytest arguments]
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from results import Results, first_line

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = ("logits absolute", "logits relative", "loss absolute", "loss relative",
           "gradients absolute", "gradients relative")


def run(words: list) -> tuple[int, list[str]]:
    """Exit code and lines, printed as they come."""
    print("$ " + " ".join(map(str, words)), flush=True)
    process = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT,
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    return process.wait(), lines


def parity(results: Results, inputs: str, dtype: str = "float32") -> int:
    code, lines = run([sys.executable, "-m", "megatron_vl", "parity",
                       Path(inputs).resolve() / "tiny", "--dtype", dtype])
    for line in lines:
        found = re.fullmatch(r"(\S.*?|  \S.*?)((?:\s+\d\.\de[+-]\d+){6})", line)
        if found:
            values = map(float, found[2].split())
            results.row("Parity with transformers", dtype=dtype, case=found[1].strip(),
                        **dict(zip(NUMBERS, values, strict=True)),
                        note="TP1 PP1; transformers in fp32 on the CPU judges")
    last = next((line for line in reversed(lines) if line.strip()), "")
    results.row("Parity verdict", dtype=dtype, exit_code=code, verdict=first_line(last))
    if code:
        results.failed(f"parity {dtype}: {first_line(last)}")
    return min(code, 1)


def tests(results: Results, *arguments: str) -> int:
    files = [path.relative_to(ROOT) for path in sorted((ROOT / "tests").rglob("test_*.py"))
             if "mark.gpu" in path.read_text(encoding="utf-8")]
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files,
             *arguments]
    code, lines = run(words)
    summary = next((line for line in reversed(lines) if re.search(r"\d+ \w+.* in ", line)), "")
    results.row("Tests marked gpu", command=" ".join(map(str, words[1:])), exit_code=code,
                summary=summary.strip("= "))
    broken = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    for line in broken[:20]:
        results.row("Failed tests", test=line[:200])
    if code or broken:
        results.failed(f"pytest -m gpu: {first_line(summary) or f'exit code {code}'}")
    return min(code, 1)


def main() -> int:
    path, what, *words = sys.argv[1:]
    results = Results(Path(path))
    results.save()
    return {"parity": parity, "tests": tests}[what](results, *words)


if __name__ == "__main__":
    sys.exit(main())
