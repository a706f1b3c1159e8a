#!/usr/bin/env bash
# Convert a Qwen3-VL checkpoint: MODEL_SIZE SOURCE TARGET TP PP mg2hf PR [HF_CKPT_PATH].
# The same script serves every family; run it without arguments for its usage table.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail
CONVERTOR=$0 exec bash "$(dirname "${BASH_SOURCE[0]}")/../../hf2mcore_convertor.sh" "$@"
