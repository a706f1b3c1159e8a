#!/usr/bin/env bash
# From a fresh machine to a trained Hugging Face directory, in about 10 minutes on two cores, without
# a GPU: each step is the command a user would type, printed before it runs.
#   bash examples/quickstart.sh [--family qwen2_vl]
#   --family     qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen_vl or baichuan2
#                (default: qwen2_vl)
#   WORK=dir     where everything is written (default: .quickstart)
#   VENV=dir     the environment to make or reuse (default: .venv)
#   PYTHON=path  the Python to make it with (default: python3)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. toolkits/environment.sh

case "$# $*" in
  "0 ") FAMILY=qwen2_vl ;;
  "2 --family "*) FAMILY=$2 ;;
  *) FAMILY= ;;
esac
# What differs: the tiny model, its data, the launcher and the converter.
SIZES=(--num-layers 4 --ffn-size 192 --init-std 0.08 --dtype float32)
IMAGES=(--patch-size 8 --min-pixels 4096 --max-pixels 4096)
QUESTIONS=() TRAIN=() ASK=() PRETRAIN=300 FINETUNE=550
CONVERTOR=toolkits/hf2mcore_convertor.sh
# One language layer beside the vision tower on stage 0, three on stage 1: an uneven split.
PP=2 LAYOUT=(MP_PP0_LAYERS=1) PARTS="TP 1, PP 2, vision tower and 1 layer on stage 0"
case $FAMILY in
  qwen2_vl | qwen2_5_vl | qwen3_vl)
    SIZES+=(--hidden-size 64 "${IMAGES[@]}")
    LAUNCHER=examples/$FAMILY/run_mcore_qwen.sh
    CONVERTOR=toolkits/model_checkpoints_convertor/qwen/hf2mcore_${FAMILY}_convertor.sh
    ;;
  qwen3_vl_moe)
    SIZES+=(--hidden-size 64 "${IMAGES[@]}")
    LAUNCHER=examples/qwen3_vl/run_mcore_qwen.sh
    CONVERTOR=toolkits/model_checkpoints_convertor/qwen/hf2mcore_qwen3_vl_convertor.sh
    PP=1 LAYOUT=(MP_EP=2 NPROC_PER_NODE=2) PARTS="half of every layer's experts on each of 2 ranks"
    ;;
  qwen_vl)
    SIZES+=(--hidden-size 128 --vision-queries 16 "${IMAGES[@]}")
    LAUNCHER=examples/qwen_vl/finetune_ds.sh
    TRAIN=(--fix_vit False --warmup_ratio 0.05)
    PRETRAIN=500 FINETUNE=700
    ASK=(--limit 1000) # as the figures in docs/benchmarks.md
    ;;
  baichuan2)
    SIZES+=(--hidden-size 64)
    QUESTIONS=(--text)
    LAUNCHER=examples/baichuan2/fine_tune_train.sh
    TRAIN=(--warmup_ratio 0.05)
    PRETRAIN=100 FINETUNE=400
    ;;
  *)
    echo "quickstart.sh: give --family qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen_vl or" \
      "baichuan2, not '$*'." >&2
    exit 2
    ;;
esac

WORK=${WORK:-.quickstart}
VENV=${VENV:-.venv}
started=$SECONDS
doing="starting"

finished() {
  local code=$?
  [ "$code" -ne 0 ] || return 0
  printf '\nquickstart stopped while %s (exit code %s).\n' "$doing" "$code" >&2
  printf 'The lines above say why. Mend it and run the same command again: %s is written anew and\n' "$WORK" >&2
  printf 'the environment %s is kept. To see a traceback, run the last command with --debug.\n' "$VENV" >&2
}
trap finished EXIT

step() {
  doing=$1
  printf '\n== [%s] %s\n' "$(printf '%d:%02d' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)))" "$1"
}

# run WORDS: prints the command as it can be typed, then runs it.
run() {
  printf '$'
  printf ' %q' "$@"
  printf '\n'
  "$@"
}

if [ -e "$WORK" ] && [ ! -e "$WORK/.megatron-vl-quickstart" ]; then
  doing="looking at $WORK"
  give_up "$WORK exists and is not a quickstart's folder; remove it, or set WORK to another one."
fi

step "making the environment"
make_environment "$VENV" ".[test]"
VENV=$(cd "$VENV" && pwd)
export PATH="$VENV/bin:$PATH" PYTHON="$VENV/bin/python"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

rm -rf "$WORK"
mkdir -p "$WORK"
touch "$WORK/.megatron-vl-quickstart"

# prepare NAME JSON
prepare() {
  run python toolkits/pretrain_data_preprocessing/convert_llava_pretrain_to_wds.py "$WORK/data" \
    --json "$2" --output "$WORK/data/wds-$1"
}

# train NAME WEIGHTS STEPS WARMUP MIN_LR SAVE_INTERVAL: on 2 ranks (gloo), samples packed into rows of
# 512 tokens, 4 rows a step. CHECKPOINT and LOG are what it wrote.
train() {
  local data=$WORK/data/wds-$1 out=$WORK/$1 weights=$2 steps=$3 warmup=$4 min_lr=$5 save=$6
  local options="--eval-iters 10 --log-interval 10" schedule=cosine
  # Its tower begins to see shapes late, and not at a low rate.
  [ "$FAMILY $1" != "qwen_vl pretrain" ] || schedule=constant_with_warmup
  case $FAMILY in
    qwen2_vl | qwen2_5_vl | qwen3_vl | qwen3_vl_moe)
      [ "$1" = pretrain ] || options="$options --finetune"
      run env "${LAYOUT[@]}" MP_PACKING_BUFFER=256 MP_EXTRA="$options" \
        bash "$LAUNCHER" \
        dsw auto 1 4 1e-3 "$min_lr" 512 512 fp32 1 "$PP" 1 true true false false "$save" \
        "$data" "$data" "$weights" "$steps" "$warmup" "$out"
      CHECKPOINT=$(ls -d "$out"/checkpoint/*)
      LOG=$(ls -d "$out"/log/*)
      ;;
    qwen_vl | baichuan2) # the flags of the family's own script; the last of a flag counts
      run bash "$LAUNCHER" "$data" "$weights" "$out" --bf16 False --gradient_checkpointing False \
        --model_max_length 512 --per_device_train_batch_size 1 --gradient_accumulation_steps 4 \
        --learning_rate 1e-3 --lr_scheduler_type "$schedule" --max_steps "$steps" --logging_steps 10 \
        --save_strategy steps --save_steps "$save" ${TRAIN[@]+"${TRAIN[@]}"} \
        -- --pp 2 --first-stage-layers 1 --packing-buffer-size 256 --min-lr "$min_lr"
      CHECKPOINT=$out/checkpoint
      LOG=$out/checkpoint
      ;;
  esac
}

step "writing a small random $FAMILY as a Hugging Face directory"
run megatron-vl tiny "$WORK/hf" --model-type "$FAMILY" "${SIZES[@]}"

step "writing easy-VQA, real images and questions, as LLaVA-style JSON"
run python toolkits/pretrain_data_preprocessing/easy_vqa_to_llava.py "$WORK/data" \
  --yes-no-per-image 2 ${QUESTIONS[@]+"${QUESTIONS[@]}"}

step "turning it into energon shards: shape questions to pretrain on, all kinds to finetune on"
prepare pretrain train-shape.json
prepare finetune train.json

step "converting the weights to Megatron-Core: $PARTS"
run env "${LAYOUT[@]}" bash "$CONVERTOR" auto "$WORK/hf" "$WORK/mcore" 1 "$PP" false fp32

step "pretraining on 2 ranks (gloo): $PRETRAIN steps on what shape an image shows"
train pretrain "$WORK/mcore" "$PRETRAIN" 30 3e-4 "$PRETRAIN"
PRETRAINED=$CHECKPOINT PRETRAIN_LOG=$LOG
[ ! -d "$WORK/pretrain/hf" ] || PRETRAINED=$WORK/pretrain/hf # weights alone

step "finetuning on 2 ranks: $FINETUNE steps on shape, colour and yes/no questions"
train finetune "$PRETRAINED" "$FINETUNE" 20 5e-5 275

step "converting the trained checkpoint back to Hugging Face"
PUBLISHED=$WORK/trained-hf
if [ "$FAMILY" = baichuan2 ]; then # as a Llama, which transformers runs without the model's own code
  run megatron-vl convert "$CHECKPOINT" "$WORK/trained-hf" --to hf --llamafy
  PUBLISHED=$WORK/finetune/hf
else
  run bash "$CONVERTOR" auto "$CHECKPOINT" "$WORK/trained-hf" 1 "$PP" true fp32 "$WORK/hf"
fi

step "drawing the loss"
run megatron-vl plot "$PRETRAIN_LOG" --output "$WORK/loss-pretrain.png" \
  --title "pretraining: what shape is it?"
run megatron-vl plot "$LOG" --output "$WORK/loss.png" \
  --title "finetuning: shape, colour and yes/no"

step "asking the trained weights the questions about images they never saw"
run megatron-vl evaluate "$PUBLISHED" "$WORK/data/test.json" --group-by groups --max-new-tokens 8 \
  --batch-size 128 --output "$WORK/answers" --at-least "colour and shape=0.80" \
  ${ASK[@]+"${ASK[@]}"} | tee "$WORK/accuracy.txt"

step "done"
cat <<TXT
$WORK/
  hf/            the random $FAMILY, as published models are laid out
  data/          easy-VQA as JSON; wds-pretrain/ and wds-finetune/ are energon datasets
  mcore/         its weights, $PARTS: release/mp_rank_00_000 and mp_rank_00_001
  pretrain/      checkpoints and metrics of the first run
  finetune/      the same of the second; $LOG/report.html is a page about it
  trained-hf/    the trained model as a Hugging Face directory
  loss.png       the finetuning's loss, gradient norm and throughput
  answers/       answers.jsonl: every question, the expected answer, the given one;  worst.html: the
                 worst of them as a page;  accuracy.txt: the table above

What to try next
  . ${VENV#"$PWD"/}/bin/activate
      so that your shell finds megatron-vl
  megatron-vl chat $PUBLISHED
      ask the trained model yourself
  megatron-vl parity $PUBLISHED --tp 2 --pp 2 --sequence-parallel
      the trained model against its judge: logits, loss and every gradient, on four ranks
  megatron-vl convert $WORK/hf $WORK/mcore-tp2 --tp 2 --dry-run
      how each weight would be cut for another layout
  megatron-vl lint $WORK/data/wds-finetune --model $WORK/hf --seq-length 512
      what is in a dataset, how full its rows get, and which text is trained, as a page
  $LAUNCHER with your own weights and shards; README.md has the page of each family
TXT
