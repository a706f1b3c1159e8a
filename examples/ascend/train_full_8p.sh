#!/usr/bin/env bash
# Fine-tune Qwen-VL on Ascend Snt9B (Atlas A2) by the words of the published train_full_8p.sh. Flags
# of finetune.py may follow, and behind -- options of `megatron-vl train`. A thin shim over
# `megatron-vl finetune`.
# Never run on an NPU.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail

model_name="" data_path="" output_path=./output-qwen-vl
batch_size=1 gradient_accumulation_steps=16 epochs=5
WORDS=() # finetune's own, which refuses what it does not know
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
  case "$1" in
  --model_name=* | --data_path=* | --output_path=* | --batch_size=* | --epochs=* | \
    --gradient_accumulation_steps=*)
    NAME=${1%%=*}
    printf -v "${NAME#--}" %s "${1#*=}"
    ;;
  *) WORDS+=("$1") ;;
  esac
  shift
done
if [ -z "$model_name" ] || [ -z "$data_path" ]; then
  echo "usage: bash $0 --model_name=DIR --data_path=JSON [--epochs=N] [--batch_size=N]" \
    "[--gradient_accumulation_steps=N] [--output_path=DIR] [--dry-run] [-- --OPTION VALUE ..]" >&2
  exit 2
fi

# Run from anywhere, installed or not.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$HERE/../..${PYTHONPATH:+:$PYTHONPATH}"
source "$HERE/env.sh"

# One process an NPU that ASCEND_RT_VISIBLE_DEVICES leaves, unless NPUS_PER_NODE says how many.
if [ -n "${NPUS_PER_NODE:-}" ]; then export NPROC_PER_NODE=$NPUS_PER_NODE; fi
exec "${PYTHON:-python}" -m megatron_vl finetune \
  --data-format qwen_vl \
  --model_name_or_path "$model_name" \
  --data_path "$data_path" \
  --bf16 True \
  --fix_vit True \
  --output_dir "$output_path" \
  --num_train_epochs "$epochs" \
  --per_device_train_batch_size "$batch_size" \
  --gradient_accumulation_steps "$gradient_accumulation_steps" \
  --evaluation_strategy no \
  --save_strategy epoch \
  --save_total_limit 2 \
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
  --dataloader_num_workers 8 \
  --deepspeed "$HERE/../qwen_vl/ds_config.json" \
  ${WORDS[@]+"${WORDS[@]}"} "$@"
