#!/usr/bin/env bash
# What to type as the command of a PAI-DLC job (framework PyTorch), the same on every node. DLC sets
# WORLD_SIZE (nodes), RANK, MASTER_ADDR, MASTER_PORT and NPROC_PER_NODE; `dlc` makes the script read
# them. The paths are those of the job's mounted storage; set the variables to yours.
# Not yet run on DLC.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail

CODE=${CODE:-/mnt/workspace/megatron-vl}
DATA=${DATA:-/mnt/data/wds}
WEIGHTS=${WEIGHTS:-/mnt/data/mcore}
OUTPUT=${OUTPUT:-/mnt/data/out}

cd "$CODE"
# 7B, TP2 x PP2, bf16, rows of 2048 tokens; README.md explains the 23 arguments.
exec bash examples/qwen2_vl/run_mcore_qwen.sh dlc 7B 1 256 1e-5 1e-6 2048 2048 \
  bf16 2 2 1 true true sel false 1000 "$DATA" "$DATA" "$WEIGHTS" 10000 100 "$OUTPUT"
