#!/usr/bin/env bash
# Fine-tune Qwen-VL as its own finetune_ds.sh does, with the flags of its finetune.py; more of them,
# and behind -- options of `megatron-vl train`, follow OUTPUT. A thin shim over `megatron-vl
# finetune`.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail

if [ $# -lt 3 ]; then
  cat >&2 <<TABLE
usage: [HOSTFILE=FILE] bash $0 DATA MODEL OUTPUT [--FLAG VALUE ..] [-- --OPTION VALUE ..]

  DATA      JSON list of {id, conversations: [{from, value}]} with <img>path</img> in the values, or
            what megatron-vl prepare made of it
  MODEL     directory of Qwen-VL or Qwen-VL-Chat, or a converted checkpoint of it
  OUTPUT    gets checkpoint/, and hf/ when training has ended
  GPUS_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT are those of Qwen-VL's script; a
  scheduler's variables are read where NNODES is not set.
  HOSTFILE  hosts as DeepSpeed lists them, "host slots=8" a line; DATA must be prepared then
  Flags are those of finetune.py, such as --num_train_epochs 2; options are megatron-vl train's,
  such as --tp 2.
TABLE
  exit 2
fi
DATA=$1 MODEL=$2 OUTPUT=$3
shift 3

# Run from anywhere, installed or not.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$HERE/../..${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "${GPUS_PER_NODE:-}" ]; then export NPROC_PER_NODE=$GPUS_PER_NODE; fi
LAUNCH=()
if [ -n "${HOSTFILE:-}" ]; then LAUNCH=(launch --hostfile "$HOSTFILE" --); fi
exec "${PYTHON:-python}" -m megatron_vl ${LAUNCH[@]+"${LAUNCH[@]}"} finetune \
  --data-format qwen_vl \
  --model_name_or_path "$MODEL" \
  --data_path "$DATA" \
  --bf16 True \
  --fix_vit True \
  --output_dir "$OUTPUT" \
  --num_train_epochs 5 \
  --per_device_train_batch_size 2 \
  --gradient_accumulation_steps 8 \
  --evaluation_strategy no \
  --save_strategy steps \
  --save_steps 1000 \
  --save_total_limit 10 \
  --learning_rate 1e-5 \
  --weight_decay 0.1 \
  --adam_beta2 0.95 \
  --warmup_ratio 0.01 \
  --lr_scheduler_type cosine \
  --logging_steps 1 \
  --report_to none \
  --model_max_length 2048 \
  --gradient_checkpointing True \
  --lazy_preprocess True \
  --deepspeed "$HERE/ds_config.json" \
  "$@"
