#!/usr/bin/env bash
# Prove and measure everything on this machine; see README.md beside this file.
#   bash toolkits/gpu/check.sh OUT [--device cuda|npu|cpu] [--tiny] [--only STEP,STEP] [--minutes N]
#                                  [--inputs DIR] [--pack]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$(cd "$HERE/../.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}  # one machine: no other interface is needed
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}  # in each process
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$HERE/check.py" "$@"
