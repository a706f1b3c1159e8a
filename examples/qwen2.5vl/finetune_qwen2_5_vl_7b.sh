#!/usr/bin/env bash
# Finetune Qwen2.5-VL by MindSpeed-MM's files: edit the variables below as in its script of this
# name. MM_DATA and MM_MODEL are its data.json and model.json, LOAD_PATH what mm-convert wrote, or
# the model's Hugging Face directory. What has no meaning here is printed as a note.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail

NPUS_PER_NODE=${NPUS_PER_NODE:-8} # devices of a node, whatever they are
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MM_DATA=${MM_DATA:-$HERE/data_7b.json}
MM_MODEL=${MM_MODEL:-$HERE/model_7b.json}
LOAD_PATH=${LOAD_PATH:-ckpt/mm_path/Qwen2.5-VL-7B-Instruct}
SAVE_PATH=${SAVE_PATH:-save_dir}
TP=${TP:-1}
PP=${PP:-2}
CP=${CP:-1}
MBS=${MBS:-1}
GRAD_ACC_STEP=${GRAD_ACC_STEP:-48}
for NAME in NPUS_PER_NODE NNODES TP PP CP MBS GRAD_ACC_STEP; do
  if ! [[ ${!NAME} =~ ^[1-9][0-9]{0,8}$ ]]; then
    echo "$0: $NAME is '${!NAME}'; give a whole number above 0." >&2
    exit 2
  fi
done
WORLD_SIZE=$((NPUS_PER_NODE * NNODES))
if [ $((WORLD_SIZE % (TP * PP * CP))) -ne 0 ]; then
  echo "$0: NPUS_PER_NODE $NPUS_PER_NODE x NNODES $NNODES is no multiple of TP $TP x PP $PP x CP $CP;" \
    "make it one." >&2
  exit 2
fi
DP=$((WORLD_SIZE / TP / PP / CP))
GBS=$((MBS * GRAD_ACC_STEP * DP))

DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE
    --nnodes $NNODES
    --node_rank $NODE_RANK
    --master_addr $MASTER_ADDR
    --master_port $MASTER_PORT
"

GPT_ARGS="
    --use-mcore-models
    --tensor-model-parallel-size ${TP}
    --pipeline-model-parallel-size ${PP}
    --context-parallel-size ${CP}
    --context-parallel-algo ulysses_cp_algo
    --micro-batch-size ${MBS}
    --global-batch-size ${GBS}
    --tokenizer-type NullTokenizer
    --vocab-size 152064
    --seq-length 1024
    --make-vocab-size-divisible-by 1
    --normalization RMSNorm
    --use-fused-rmsnorm
    --swiglu
    --use-fused-swiglu
    --no-masked-softmax-fusion
    --lr 1.0e-5
    --lr-decay-style cosine
    --weight-decay 0
    --train-iters 10000
    --lr-warmup-fraction 0.1
    --clip-grad 0.0
    --adam-beta1 0.9
    --adam-beta2 0.999
    --seed 42
    --bf16
    --load $LOAD_PATH
    --use-flash-attn
    --variable-seq-lengths
    --use-distributed-optimizer
    --no-load-optim
    --no-load-rng
    --no-save-optim
    --no-save-rng
    --num-workers 8
    --distributed-timeout-minutes 20
"

MM_ARGS=(--mm-data "$MM_DATA" --mm-model "$MM_MODEL")

OUTPUT_ARGS="
    --log-interval 1
    --save-interval 10000
    --eval-interval 10000
    --eval-iters 5000
    --save $SAVE_PATH
    --ckpt-format torch
    --log-tps
"

# Run from anywhere, installed or not.
export PYTHONPATH="$HERE/../..${PYTHONPATH:+:$PYTHONPATH}"
# Words, not patterns; arguments given to this script come last and count.
set -f
# shellcheck disable=SC2086
exec "${PYTHON:-python}" -m megatron_vl.cli.mm_train $DISTRIBUTED_ARGS $GPT_ARGS "${MM_ARGS[@]}" \
  $OUTPUT_ARGS "$@"
