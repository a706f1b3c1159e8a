#!/usr/bin/env bash
# Break the project on purpose, one fault at a time, and see the test that is to notice it fail.
#   bash tests/mutants.sh [WORD ...]    only the faults whose name, file or test holds a WORD
#   VENV=path                           the environment of tests/run.sh (default: .venv-test)
# The faults are the blocks of tests/mutants.txt. They are made in a copy of the tree, never in it:
# each named test has to pass in the copy as it is, and to fail with the fault. Not part of CI; run
# it after a change of the tests, to know that they see what they saw.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=$(cd "${VENV:-.venv-test}" && pwd)
export PATH="$VENV/bin:$PATH" PYTHON="$VENV/bin/python"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
COPIES=$(mktemp -d)
trap 'rm -rf "$COPIES"' EXIT
for COPY in a b; do
  mkdir "$COPIES/$COPY"
  git ls-files -z --cached --others --exclude-standard | tar --null -T - -c | tar -x -C "$COPIES/$COPY"
done

"$PYTHON" - "$COPIES" "$@" <<'PROGRAM'
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

folder, wanted = Path(sys.argv[1]), sys.argv[2:]
lines = Path("tests/mutants.txt").read_text(encoding="utf-8").split("\n")
blocks = "\n".join(line for line in lines if not line.startswith("#")).strip().split("\n\n")
rows = [tuple(block.strip().split("\n")) for block in blocks]
assert all(len(row) == 4 for row in rows), [row for row in rows if len(row) != 4]
rows = [row for row in rows if not wanted or any(word in text for word in wanted for text in row)]
copies = SimpleQueue()  # that nothing runs in
for copy in folder.iterdir():
    copies.put(copy)


def fails(copy: Path, *words: str) -> str:
    """What a test says that fails; empty if all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *words]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 0: they pass, 1: one fails, else none ran
        sys.exit(f"{words} cannot run:\n{done.stdout}{done.stderr}")
    return done.stdout if done.returncode else ""


def break_and_test(row: tuple[str, str, str, str]) -> bool:
    name, file, expression, test = row
    copy = copies.get()
    try:
        whole = (copy / file).read_bytes()
        subprocess.run(["sed", "-i", "-e", expression, file], cwd=copy, check=True)
        if (copy / file).read_bytes() == whole:
            sys.exit(f"{name}: {expression} changes nothing in {file}")
        began = time.monotonic()
        seen = bool(fails(copy, "-x", test))
        (copy / file).write_bytes(whole)
    finally:
        copies.put(copy)
    print(f"| {name} | {file} | {test.removeprefix('tests/')} | {'yes' if seen else '**NO**'} "
          f"| {time.monotonic() - began:.0f} |", flush=True)
    return seen


tests = dict.fromkeys(row[3] for row in rows)
print(f"{len(rows)} faults, {len(tests)} tests; first the tree as it is", flush=True)
copy = copies.get()
if said := fails(copy, "-n", "2", "--dist", "load", "--maxschedchunk", "1", *tests):
    sys.exit(f"{said}\na test fails without any fault")
copies.put(copy)
print("| fault | file | test | seen | s |\n|---|---|---|---|---|", flush=True)
with ThreadPoolExecutor(2) as pool:
    seen = sum(pool.map(break_and_test, rows))
print(f"{seen} of {len(rows)} faults seen")
sys.exit(seen < len(rows))
PROGRAM
