#!/usr/bin/env bash
# Fine-tune Baichuan2-7B as its own fine-tune.py does, with the flags of its README; more of them,
# and behind -- options of `megatron-vl train`, follow OUTPUT. A thin shim over `megatron-vl
# finetune`.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail

if [ $# -lt 3 ]; then
  cat >&2 <<TABLE
usage: [HOSTFILE=FILE] bash $0 DATA MODEL OUTPUT [--FLAG VALUE ..] [-- --OPTION VALUE ..]

  DATA      JSON list of {id, conversations: [{from, value}]}, or what megatron-vl prepare made of it
  MODEL     directory of Baichuan2-7B-Base or Baichuan2-7B-Chat, or a converted checkpoint of it
  OUTPUT    gets checkpoint/, and hf/ when training has ended
  HOSTFILE  hosts as DeepSpeed lists them, "host slots=8" a line; DATA must be prepared then
  Flags are those of fine-tune.py, such as --num_train_epochs 2; options are megatron-vl train's,
  such as --tp 2.
TABLE
  exit 2
fi
DATA=$1 MODEL=$2 OUTPUT=$3
shift 3

# Run from anywhere, installed or not.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$HERE/../..${PYTHONPATH:+:$PYTHONPATH}"

LAUNCH=()
if [ -n "${HOSTFILE:-}" ]; then LAUNCH=(launch --hostfile "$HOSTFILE" --); fi
exec "${PYTHON:-python}" -m megatron_vl ${LAUNCH[@]+"${LAUNCH[@]}"} finetune \
  --report_to none \
  --data_path "$DATA" \
  --model_name_or_path "$MODEL" \
  --output_dir "$OUTPUT" \
  --model_max_length 512 \
  --num_train_epochs 4 \
  --per_device_train_batch_size 16 \
  --gradient_accumulation_steps 1 \
  --save_strategy epoch \
  --learning_rate 2e-5 \
  --lr_scheduler_type constant \
  --adam_beta1 0.9 \
  --adam_beta2 0.98 \
  --adam_epsilon 1e-8 \
  --max_grad_norm 1.0 \
  --weight_decay 1e-4 \
  --warmup_ratio 0.0 \
  --logging_steps 1 \
  --gradient_checkpointing True \
  --deepspeed "$HERE/ds_config.json" \
  --bf16 True \
  --tf32 True \
  "$@"
