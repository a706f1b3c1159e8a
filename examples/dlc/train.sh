#!/usr/bin/env bash
# What to type as the command of a PAI-DLC job (framework PyTorch), the same on every node. DLC sets
# WORLD_SIZE (nodes), RANK, MASTER_ADDR, MASTER_PORT and NPROC_PER_NODE; `dlc` makes the script read
# them. The paths are those of the job's mounted storage; set the variables below to yours.
# Not yet run on DLC; two hosts with its variables were tried, with CPU ranks.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail

CODE=${CODE:-/mnt/workspace/megatron-vl}
DATA=${DATA:-/mnt/data/wds}
WEIGHTS=${WEIGHTS:-/mnt/data/mcore}
OUTPUT=${OUTPUT:-/mnt/data/out}
MODEL_SIZE=${MODEL_SIZE:-7B}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256}
SEQ_LEN=${SEQ_LEN:-2048}
PRECISION=${PRECISION:-bf16}
TP=${TP:-2}
PP=${PP:-2}
STEPS=${STEPS:-10000}

cd "$CODE"
# README.md explains the 23 arguments.
exec bash examples/qwen2_vl/run_mcore_qwen.sh dlc "$MODEL_SIZE" 1 "$GLOBAL_BATCH_SIZE" 1e-5 1e-6 \
  "$SEQ_LEN" "$SEQ_LEN" "$PRECISION" "$TP" "$PP" 1 true true sel false 1000 "$DATA" "$DATA" \
  "$WEIGHTS" "$STEPS" "$((STEPS / 100))" "$OUTPUT"
