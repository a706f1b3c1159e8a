#!/usr/bin/env bash
# Make the test environment and run every test that fits this machine.
#   bash tests/run.sh --quick           the unit tests, one comparison and one training
#   bash tests/run.sh --hosts           only runs over several hosts of this machine: needs root
#   bash tests/run.sh [pytest arguments]
#   VENV=path   the environment to make or reuse (default: .venv-test)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. toolkits/environment.sh

VENV=${VENV:-.venv-test}
make_environment "$VENV" ".[test]"

VENV=$(cd "$VENV" && pwd)

say "checking style: ruff check ."
"$VENV/bin/ruff" check . || give_up "the style check failed; $VENV/bin/ruff check --fix . mends most."

say "running the tests (about 25 minutes on two cores, 4 with --quick); pytest arguments: ${*:-none}"
# Two test processes, of which each may start several ranks; so one thread a process.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PATH="$VENV/bin:$PATH" PYTHON="$VENV/bin/python"
if "$VENV/bin/python" -m pytest -q -n 2 --dist load --maxschedchunk 1 --durations=15 "$@"; then
  say "all tests passed"
else
  code=$?
  say "tests failed (pytest exit code $code); one test again, with its output:"
  say "  $VENV/bin/python -m pytest -x -s tests/FILE.py -k NAME"
  exit "$code"
fi
