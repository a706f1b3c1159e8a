#!/usr/bin/env bash
# From a fresh machine to a trained model that transformers loads, in about 10 minutes on two
# cores, without a GPU: each step is the command a user would type, printed before it runs.
#   bash examples/quickstart.sh [--family qwen2_vl]
#   --family     qwen2_vl or qwen2_5_vl (default: qwen2_vl)
#   WORK=dir     where everything is written (default: .quickstart)
#   VENV=dir     the environment to make or reuse (default: .venv)
#   PYTHON=path  the Python to make it with (default: python3)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. toolkits/environment.sh

case "$# $*" in
  "0 ") FAMILY=qwen2_vl ;;
  "2 --family qwen2_vl" | "2 --family qwen2_5_vl") FAMILY=$2 ;;
  *)
    echo "quickstart.sh: give --family qwen2_vl or --family qwen2_5_vl, not '$*'." >&2
    exit 2
    ;;
esac
LAUNCHER=examples/$FAMILY/run_mcore_qwen.sh
CONVERTOR=toolkits/model_checkpoints_convertor/qwen/hf2mcore_${FAMILY}_convertor.sh

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

step "writing a small random $FAMILY as a Hugging Face directory"
run megatron-vl tiny "$WORK/hf" --model-type "$FAMILY" --hidden-size 64 --ffn-size 192 \
  --num-layers 4 --patch-size 8 --min-pixels 4096 --max-pixels 4096 --init-std 0.08 --dtype float32

step "writing easy-VQA, real images and questions, as LLaVA-style JSON"
run python toolkits/pretrain_data_preprocessing/easy_vqa_to_llava.py "$WORK/data" \
  --yes-no-per-image 2

step "turning it into energon shards: shape questions to pretrain on, all kinds to finetune on"
run python toolkits/pretrain_data_preprocessing/convert_llava_pretrain_to_wds.py "$WORK/data" \
  --json train-shape.json --output "$WORK/data/wds-pretrain"
run python toolkits/pretrain_data_preprocessing/convert_llava_pretrain_to_wds.py "$WORK/data" \
  --json train.json --output "$WORK/data/wds-finetune"

step "converting the weights to Megatron-Core: TP 1, PP 2, vision tower and 1 layer on stage 0"
# One language layer beside the vision tower on stage 0, three on stage 1: an uneven split.
run env MP_PP0_LAYERS=1 \
  bash "$CONVERTOR" \
  auto "$WORK/hf" "$WORK/mcore" 1 2 false fp32

step "pretraining on 2 ranks (gloo): 300 steps on what shape an image shows"
# Samples are packed into rows of 512 tokens; a step is 4 rows, about 36 samples.
run env MP_PP0_LAYERS=1 MP_PACKING_BUFFER=256 MP_EXTRA="--eval-iters 10 --log-interval 10" \
  bash "$LAUNCHER" \
  dsw auto 1 4 1e-3 3e-4 512 512 fp32 1 2 1 true true false false 300 \
  "$WORK/data/wds-pretrain" "$WORK/data/wds-pretrain" "$WORK/mcore" 300 30 "$WORK/pretrain"
PRETRAINED=$(ls -d "$WORK"/pretrain/checkpoint/*)

step "finetuning on 2 ranks: 550 steps on shape, colour and yes/no questions"
run env MP_PP0_LAYERS=1 MP_PACKING_BUFFER=256 MP_EXTRA="--eval-iters 10 --log-interval 10 --finetune" \
  bash "$LAUNCHER" \
  dsw auto 1 4 1e-3 5e-5 512 512 fp32 1 2 1 true true false false 275 \
  "$WORK/data/wds-finetune" "$WORK/data/wds-finetune" "$PRETRAINED" 550 20 "$WORK/finetune"
FINETUNED=$(ls -d "$WORK"/finetune/checkpoint/*)

step "converting the trained checkpoint back to Hugging Face"
run bash "$CONVERTOR" \
  auto "$FINETUNED" "$WORK/trained-hf" 1 2 true fp32 "$WORK/hf"

step "drawing the loss"
run megatron-vl plot "$(ls -d "$WORK"/pretrain/log/*)" --output "$WORK/loss-pretrain.png" \
  --title "pretraining: what shape is it?"
run megatron-vl plot "$(ls -d "$WORK"/finetune/log/*)" --output "$WORK/loss.png" \
  --title "finetuning: shape, colour and yes/no"

step "asking transformers, with the trained weights, the questions about images it never saw"
run python toolkits/evaluate_vqa.py "$WORK/trained-hf" "$WORK/data/test.json" \
  --output "$WORK/answers.jsonl" --at-least 0.80 | tee "$WORK/accuracy.txt"

step "done"
cat <<TXT
$WORK/
  hf/            the random $FAMILY, as published models are laid out
  data/          easy-VQA as JSON and images; wds-pretrain/ and wds-finetune/ are energon datasets
  mcore/         its weights for TP 1, PP 2: release/mp_rank_00_000 and mp_rank_00_001
  pretrain/      checkpoint/, tensorboard/ and log/ of the first run
  finetune/      the same of the second; report.html in its log/ is a page about it
  trained-hf/    the trained model; transformers loads it as it is
  loss.png       the finetuning's loss, validation, gradient norm and throughput
  answers.jsonl  every question, the expected answer, the given one;  accuracy.txt: the table above

What to try next
  megatron-vl parity $WORK/trained-hf --tp 2 --pp 2 --sequence-parallel
      the trained model against transformers: logits, loss and every gradient, on four ranks
  megatron-vl convert $WORK/hf $WORK/mcore-tp2 --tp 2 --dry-run
      how each weight would be cut for another layout
  megatron-vl lint $WORK/data/wds-finetune --model $WORK/hf --seq-length 512
      what is in a dataset, how full its rows get, and which text is trained, as a page
  tensorboard --logdir $WORK/finetune/tensorboard
  the same launcher with your own converted checkpoint and shards; README.md has the arguments
TXT
