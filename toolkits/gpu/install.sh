#!/usr/bin/env bash
# Install the wheels of wheelhouse.sh where there is no network; then put TARGET on PYTHONPATH.
#   bash install.sh DIR TARGET
# One pip call for all: a second --target --upgrade would delete namespaces that two wheels share.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail
DIR=${1:?usage: bash install.sh DIR TARGET} TARGET=${2:?usage: bash install.sh DIR TARGET}
"${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
  --no-compile --no-cache-dir --upgrade --target "$TARGET" "$DIR"/*.whl
echo "$(find "$DIR" -name '*.whl' | wc -l) wheels installed; export PYTHONPATH=$TARGET"
