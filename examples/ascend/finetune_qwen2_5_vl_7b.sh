#!/usr/bin/env bash
# Fine-tune Qwen2.5-VL 7B on Ascend NPUs by MindSpeed-MM's files: examples/qwen2.5vl has the script
# and its variables. CANN is made known, this node's NPUs are counted where NPUS_PER_NODE is not set,
# and the nodes are those of the ModelArts job, of another scheduler, or of NNODES and NODE_RANK.
# Never run on an NPU.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail

# Run from anywhere, installed or not.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$HERE/../..${PYTHONPATH:+:$PYTHONPATH}"
source "$HERE/env.sh"

found() { "${PYTHON:-python}" -m megatron_vl cluster-env "$1"; }
NPUS_PER_NODE=${NPUS_PER_NODE:-$(found nproc_per_node)}
NNODES=$(found nnodes)
NODE_RANK=$(found node_rank)
MASTER_ADDR=$(found master_addr)
MASTER_PORT=$(found master_port)
export NPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT
exec bash "$HERE/../qwen2.5vl/finetune_qwen2_5_vl_7b.sh" "$@"
