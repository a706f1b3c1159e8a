#!/usr/bin/env bash
# Collect the wheels that a machine without a network needs to train, beyond what it has.
#   bash wheelhouse.sh DIR [--python 3.12] [--has FILE] [--video]
#   --python  version of Python over there (default: 3.12)
#   --has     names of the packages it has, one a line (default: has.txt beside this script)
#   --video   with PyAV, 34 MiB, which only videos need
# Versions are those that pip resolves from setup.py today, by PYTHON (default: python3): an older one
# than over there gives an older megatron-core. x86-64 Linux.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

DIR=${1:?usage: bash wheelhouse.sh DIR [--python 3.12] [--has FILE] [--video]}
shift
VERSION=3.12 HAS=$HERE/has.txt VIDEO=
while [ $# -gt 0 ]; do
  case $1 in
    --python) VERSION=$2; shift 2 ;;
    --has) HAS=$2; shift 2 ;;
    --video) VIDEO=--video; shift ;;
    *) echo "wheelhouse.sh: unknown option $1" >&2; exit 2 ;;
  esac
done

PYTHON=${PYTHON:-python3}
TARGET=(--only-binary=:all: --implementation cp --python-version "$VERSION")
for platform in 2_35 2_34 2_31 2_28 2_27 2_24 2_17 2_12 2_5; do
  TARGET+=(--platform "manylinux_${platform}_x86_64")
done
TARGET+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$DIR"
"$PYTHON" "$HERE/wheels.py" wanted "$HERE/../../setup.py" $VIDEO >"$WORK/wanted"
"$PYTHON" -m pip install -qq --disable-pip-version-check --dry-run --ignore-installed \
  --target "$WORK/none" "${TARGET[@]}" --report "$WORK/report.json" -r "$WORK/wanted"
"$PYTHON" "$HERE/wheels.py" missing "$WORK/report.json" "$WORK/wanted" "$HAS" "$VERSION" \
  >"$WORK/missing"
rm -f "$DIR"/*.whl
"$PYTHON" -m pip download -qq --disable-pip-version-check --no-deps "${TARGET[@]}" \
  --dest "$DIR" -r "$WORK/missing"
(cd "$DIR" && du -k --apparent-size -- *.whl | sort -n)
echo "$(find "$DIR" -name '*.whl' | wc -l) wheels," \
  "$(du -sk --apparent-size "$DIR" | awk '{printf "%.1f MiB", $1 / 1024}') in $DIR"
