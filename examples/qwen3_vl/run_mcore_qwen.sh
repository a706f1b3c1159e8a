#!/usr/bin/env bash
# Train Qwen3-VL: the arguments are those of Qwen2-VL's launcher, 23 or 24; run it without any for
# its usage table.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail
FAMILY=qwen3-vl LAUNCHER=$0 exec bash "$(dirname "${BASH_SOURCE[0]}")/../qwen2_vl/run_mcore_qwen.sh" "$@"
