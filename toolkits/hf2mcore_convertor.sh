#!/usr/bin/env bash
# Convert a checkpoint of any supported family; `model_type` of config.json says which.
# A thin shim over `megatron-vl convert`, for those who know the positional form.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail

usage() {
  cat >&2 <<TABLE
usage: [MP_PP0_LAYERS=n] [MP_VP=n] [MP_OVERWRITE=true] bash ${CONVERTOR:-$0} \\
           MODEL_SIZE SOURCE TARGET TP PP mg2hf PR [HF_CKPT_PATH]

  1 MODEL_SIZE    a published size, such as 7B, or auto; checked against config.json, which
                  alone gives the sizes
  2 SOURCE        checkpoint to convert: a Hugging Face directory, or Megatron-Core's if mg2hf
  3 TARGET        directory to write; refused if it holds anything, unless MP_OVERWRITE=true
  4 TP            tensor-parallel ranks of the Megatron-Core checkpoint
  5 PP            pipeline stages of the Megatron-Core checkpoint
  6 mg2hf         false: Hugging Face to Megatron-Core; true: back
  7 PR            dtype of the target: fp16, bf16 or fp32
  8 HF_CKPT_PATH  directory with config.json and tokenizer; required when mg2hf is true

  MP_PP0_LAYERS   language layers on stage 0, the rest evenly (to Megatron-Core only)
  MP_VP           model chunks a stage (to Megatron-Core only)
  MP_EP           ranks that hold different experts of a layer (to Megatron-Core only)
  MP_ETP          ranks that share an expert, a divisor of TP (to Megatron-Core only; default: TP)
  MP_OVERWRITE    true replaces a checkpoint in TARGET
  MP_DRY_RUN      true: print what would be copied where, write nothing
TABLE
  exit 2
}

refuse() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

if [ $# -lt 7 ]; then
  echo "$(basename "$0"): arguments given: $#; needed: 7, or 8 with HF_CKPT_PATH" >&2
  usage
fi
[ $# -le 8 ] || refuse "$# arguments are too many; give 7 or 8."

MODEL_SIZE=$1
SOURCE=$2
TARGET=$3
TP=$4
PP=$5
MG2HF=$6
PR=$7
HF_CKPT_PATH=${8:-}

for NAME in SOURCE TARGET; do
  [ -n "${!NAME}" ] || refuse "$NAME is empty; give a directory."
done

MP_PP0_LAYERS=${MP_PP0_LAYERS:-}
MP_VP=${MP_VP:-}
MP_EP=${MP_EP:-}
MP_ETP=${MP_ETP:-}
MP_OVERWRITE=${MP_OVERWRITE:-false}
MP_DRY_RUN=${MP_DRY_RUN:-false}

whole_number() {
  [[ $2 =~ ^[0-9]+$ ]] || refuse "$1 is '$2'; give a whole number."
}

whole_number TP "$TP"
whole_number PP "$PP"
if [ -n "$MP_PP0_LAYERS" ]; then whole_number MP_PP0_LAYERS "$MP_PP0_LAYERS"; fi
if [ -n "$MP_VP" ]; then whole_number MP_VP "$MP_VP"; fi
if [ -n "$MP_EP" ]; then whole_number MP_EP "$MP_EP"; fi
if [ -n "$MP_ETP" ]; then whole_number MP_ETP "$MP_ETP"; fi

case $PR in
  fp16 | float16) DTYPE=float16 ;;
  bf16 | bfloat16) DTYPE=bfloat16 ;;
  fp32 | float32) DTYPE=float32 ;;
  *) refuse "PR is '$PR'; use fp16, bf16 or fp32." ;;
esac

OPTIONS=(--dtype "$DTYPE" --model-size "$MODEL_SIZE")

case $MP_OVERWRITE in
  true) OPTIONS+=(--overwrite) ;;
  false) ;;
  *) refuse "MP_OVERWRITE is '$MP_OVERWRITE'; use true or false." ;;
esac

case $MP_DRY_RUN in
  true) OPTIONS+=(--dry-run) ;;
  false) ;;
  *) refuse "MP_DRY_RUN is '$MP_DRY_RUN'; use true or false." ;;
esac

case $MG2HF in
  true)
    [ -n "$HF_CKPT_PATH" ] || refuse "mg2hf is true, so argument 8, HF_CKPT_PATH, is required."
    # TP and PP are not passed on: a Megatron-Core checkpoint says itself how it is laid out.
    OPTIONS+=(--from mcore --to hf --hf-config "$HF_CKPT_PATH")
    ;;
  false)
    OPTIONS+=(--from hf --to mcore --tp "$TP" --pp "$PP")
    if [ -n "$MP_PP0_LAYERS" ]; then OPTIONS+=(--first-stage-layers "$MP_PP0_LAYERS"); fi
    if [ -n "$MP_VP" ]; then OPTIONS+=(--vp "$MP_VP"); fi
    if [ -n "$MP_EP" ]; then OPTIONS+=(--ep "$MP_EP"); fi
    if [ -n "$MP_ETP" ]; then OPTIONS+=(--etp "$MP_ETP"); fi
    if [ -n "$HF_CKPT_PATH" ]; then OPTIONS+=(--hf-config "$HF_CKPT_PATH"); fi
    ;;
  *) refuse "mg2hf is '$MG2HF'; use true or false." ;;
esac

if [ "$MP_OVERWRITE$MP_DRY_RUN" = falsefalse ] && [ -d "$TARGET" ] && [ -n "$(ls -A "$TARGET")" ]; then
  refuse "TARGET $TARGET exists and is not empty; remove it, or set MP_OVERWRITE=true to replace it."
fi

# What messages are to call the options.
CALLED=(
  model-size=MODEL_SIZE tensor-model-parallel-size=TP tp=TP pipeline-model-parallel-size=PP pp=PP
  "to hf=mg2hf true" "to mcore=mg2hf false" "from hf=mg2hf false" "from mcore=mg2hf true" dtype=PR hf-config=HF_CKPT_PATH
  first-stage-layers=MP_PP0_LAYERS vp=MP_VP overwrite=MP_OVERWRITE=true dry-run=MP_DRY_RUN=true
  ep=MP_EP etp=MP_ETP
)
MEGATRON_VL_CALLED=$(IFS=';' && echo "${CALLED[*]}")
export MEGATRON_VL_CALLED

# Run from anywhere, installed or not.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python}
command -v "$PYTHON" >/dev/null || refuse "there is no $PYTHON; set PYTHON to the Python that has the packages."
exec "$PYTHON" -m megatron_vl convert "$SOURCE" "$TARGET" "${OPTIONS[@]}"
