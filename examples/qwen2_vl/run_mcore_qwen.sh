#!/usr/bin/env bash
# Train Qwen2-VL: 23 positional arguments, or 24 with SP after CP. A thin shim over
# `megatron-vl train`; run it without arguments for its usage table.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # sh may be dash
set -euo pipefail

usage() {
  cat >&2 <<TABLE
usage: [MP_PP0_LAYERS=n] [MP_VP=n] bash ${LAUNCHER:-$0} \\
           ENV MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR \\
           SEQ_LEN PAD_LEN PR TP PP CP [SP] DO FL AC OPTIMIZER_OFFLOAD SAVE_INTERVAL DATASET_PATH \\
           VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_ITERS LR_WARMUP_ITERS OUTPUT_BASEPATH

   1 ENV                       dsw: this machine alone; dlc: one of several nodes
   2 MODEL_SIZE                a published size, such as 7B, or auto; checked against
                               config.json
   3 BATCH_SIZE                rows of a forward pass on one data-parallel rank; with TP auto, auto
   4 GLOBAL_BATCH_SIZE         rows of an optimizer step
   5 LR                        learning rate
   6 MIN_LR                    learning rate at the end of the cosine
   7 SEQ_LEN                   longest sample, and length of a packed row, in tokens
   8 PAD_LEN                   longest row when a row holds one sample, at most SEQ_LEN
   9 PR                        fp16, bf16, fp8 or fp32
  10 TP                        tensor-parallel ranks; TP, PP and CP auto: the layout that
                               megatron-vl plan names first, and with AC false its recompute
  11 PP                        pipeline stages
  12 CP                        context-parallel ranks
  -- SP                        only in the 24-argument form: sequence parallelism, true or false
  13 DO                        distributed optimizer, true or false
  14 FL                        attention: true for flash-attention first, false for cuDNN's fused
                               attention first; what is not there is passed over
  15 AC                        recompute: sel (or true), full, offload or false
  16 OPTIMIZER_OFFLOAD         optimizer state in host memory: false, static or auto (all of it),
                               or a share from 0 to 1
  17 SAVE_INTERVAL             steps between checkpoints and validations
  18 DATASET_PATH              energon dataset to train on
  19 VALID_DATASET_PATH        energon dataset whose validation split is evaluated
  20 PRETRAIN_CHECKPOINT_PATH  Hugging Face directory or model name, converted
                               checkpoint of any layout, or none
  21 TRAIN_ITERS               optimizer steps
  22 LR_WARMUP_ITERS           steps of linear warmup
  23 OUTPUT_BASEPATH           gets checkpoint/NAME, tensorboard/NAME and log/NAME

  MP_PP0_LAYERS      language layers on stage 0, the rest evenly; not set: as the checkpoint has
                     them
  MP_VP              model chunks a stage
  MP_EP              ranks that hold different experts of a layer, of TP, CP and data ranks together
  MP_ETP             ranks that share an expert, a divisor of TP (default: TP)
  MP_AC_LAYERS       with AC full: layers of a group whose input is kept (default 1: every layer's
                     is); with AC offload: layers
  MP_PACKING_BUFFER  samples packed together into rows of SEQ_LEN (default 0: one sample a row)
  MP_GPU             with TP auto: the card to count with (default: this machine's, by its name)
  MP_HF_PATH         config.json and tokenizer, when PRETRAIN_CHECKPOINT_PATH is none
  MP_EXTRA           further options of megatron-vl train, as one string
  MP_DRY_RUN         true: check it, print the layout and what every rank holds, start nothing
  NPROC_PER_NODE     processes of this node (default: its GPUs; without any, TP x PP x CP)
  With dlc the nodes are read from the scheduler's variables, WORLD_SIZE, RANK, MASTER_ADDR and
  MASTER_PORT in DLC; docs/clusters.md has the others.
TABLE
  exit 2
}

refuse() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

case $# in
  24) SP=${13} && set -- "${@:1:12}" "${@:14}" ;;
  23) SP=false ;;
  *)
    [ $# -lt 23 ] || refuse "$# arguments are too many; give 23, or 24 with SP after CP."
    echo "$(basename "$0"): arguments given: $#; needed: 23, or 24 with SP after CP" >&2
    usage
    ;;
esac

ENV=$1
MODEL_SIZE=$2
BATCH_SIZE=$3
GLOBAL_BATCH_SIZE=$4
LR=$5
MIN_LR=$6
SEQ_LEN=$7
PAD_LEN=$8
PR=$9
TP=${10}
PP=${11}
CP=${12}
DO=${13}
FL=${14}
AC=${15}
OPTIMIZER_OFFLOAD=${16}
SAVE_INTERVAL=${17}
DATASET_PATH=${18}
VALID_DATASET_PATH=${19}
PRETRAIN_CHECKPOINT_PATH=${20}
TRAIN_ITERS=${21}
LR_WARMUP_ITERS=${22}
OUTPUT_BASEPATH=${23}

for NAME in DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH OUTPUT_BASEPATH; do
  [ -n "${!NAME}" ] || refuse "$NAME is empty; give a path."
done

MP_AC_LAYERS=${MP_AC_LAYERS:-1}
MP_DRY_RUN=${MP_DRY_RUN:-false}

case $ENV in
  dsw)
    NODES=(--no-cluster-env)
    if [ -n "${NPROC_PER_NODE:-}" ]; then NODES+=(--nproc-per-node "$NPROC_PER_NODE"); fi
    ;;
  dlc) NODES=(--cluster-env) ;; # reads the scheduler's variables: docs/clusters.md
  *) refuse "ENV is '$ENV'; use dsw or dlc." ;;
esac

OPTIONS=()
switch() { # NAME VALUE FLAG [OTHER]: adds FLAG when VALUE is true, and OTHER when it is false
  case $2 in
    true) OPTIONS+=("$3") ;;
    false) OPTIONS+=(${4+"$4"}) ;;
    *) refuse "$1 is '$2'; use true or false." ;;
  esac
}

case $TP,$PP,$CP in
  auto,auto,auto) OPTIONS+=(--layout auto) ;;
  *auto*) refuse "TP is '$TP', PP '$PP' and CP '$CP'; give a size for each, or auto for all three." ;;
  *) OPTIONS+=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP") ;;
esac
if [ "$TP,$BATCH_SIZE" != auto,auto ]; then OPTIONS+=(--micro-batch-size "$BATCH_SIZE"); fi
if [ -n "${MP_GPU:-}" ]; then OPTIONS+=(--gpu "$MP_GPU"); fi

case $PR in
  bf16 | bfloat16) OPTIONS+=(--bf16) ;;
  fp16 | float16) OPTIONS+=(--fp16) ;;
  fp8) OPTIONS+=(--bf16 --fp8-format hybrid) ;;
  fp32 | float32) OPTIONS+=(--fp32) ;;
  *) refuse "PR is '$PR'; use fp16, bf16, fp8 or fp32." ;;
esac

switch SP "$SP" --sequence-parallel
switch DO "$DO" --use-distributed-optimizer --no-use-distributed-optimizer
switch MP_DRY_RUN "$MP_DRY_RUN" --dry-run

case $FL in
  true) OPTIONS+=(--attention-backend flash-first) ;;
  false) OPTIONS+=(--attention-backend auto) ;; # fused first
  *) refuse "FL is '$FL'; use true or false." ;;
esac

if [ "$AC" = true ]; then
  echo "$(basename "$0"): AC is 'true', which names no recompute; it runs as sel" >&2
  AC=sel
fi
case $AC in
  sel) OPTIONS+=(--recompute-granularity selective) ;;
  full) OPTIONS+=(--recompute-granularity full --recompute-num-layers "$MP_AC_LAYERS") ;;
  offload) OPTIONS+=(--cpu-offloading --cpu-offloading-num-layers "$MP_AC_LAYERS") ;;
  false) ;;
  *) refuse "AC is '$AC'; use sel, full, offload or false." ;;
esac

case $OPTIMIZER_OFFLOAD in
  # Megatron-Core does not measure what would fit: auto is all of it, as static.
  static | auto) OPTIONS+=(--optimizer-cpu-offload) ;;
  [0-9]*) OPTIONS+=(--optimizer-cpu-offload --optimizer-offload-fraction "$OPTIMIZER_OFFLOAD") ;;
  false) ;;
  *) refuse "OPTIMIZER_OFFLOAD is '$OPTIMIZER_OFFLOAD'; use false, static, auto or a share 0 to 1." ;;
esac

if [ "$PRETRAIN_CHECKPOINT_PATH" != none ]; then OPTIONS+=(--load "$PRETRAIN_CHECKPOINT_PATH"); fi
if [ -n "${MP_HF_PATH:-}" ]; then OPTIONS+=(--hf-config "$MP_HF_PATH"); fi
if [ -n "${MP_PP0_LAYERS:-}" ]; then
  OPTIONS+=(--decoder-first-pipeline-num-layers "$MP_PP0_LAYERS")
fi
if [ -n "${MP_VP:-}" ]; then OPTIONS+=(--num-virtual-stages-per-pipeline-rank "$MP_VP"); fi
if [ -n "${MP_EP:-}" ]; then OPTIONS+=(--expert-model-parallel-size "$MP_EP"); fi
if [ -n "${MP_ETP:-}" ]; then OPTIONS+=(--expert-tensor-parallel-size "$MP_ETP"); fi
# -d '': words of all its lines; read answers 1 at the end of the text, which is no failure.
read -r -d '' -a EXTRA <<<"${MP_EXTRA:-}" || true

NAME="mcore-${FAMILY:-qwen2-vl}-${MODEL_SIZE}-lr-${LR}-minlr-${MIN_LR}-bs-${BATCH_SIZE}-gbs-${GLOBAL_BATCH_SIZE}"
NAME+="-seqlen-${SEQ_LEN}-pr-${PR}-tp-${TP}-pp-${PP}-cp-${CP}-ac-${AC}-do-${DO}-sp-${SP}"
NAME+="-ti-${TRAIN_ITERS}-wi-${LR_WARMUP_ITERS}"

# What messages are to call the options.
CALLED=(
  model-size=MODEL_SIZE micro-batch-size=BATCH_SIZE global-batch-size=GLOBAL_BATCH_SIZE lr=LR
  min-lr=MIN_LR seq-length=SEQ_LEN max-padding-length=PAD_LEN bf16="PR bf16" fp16="PR fp16"
  "bf16 true=PR bf16" "fp16 true=PR fp16" fp32="PR fp32" fp8-format="PR fp8"
  tensor-model-parallel-size=TP tp=TP
  pipeline-model-parallel-size=PP pp=PP context-parallel-size=CP cp=CP sequence-parallel=SP
  use-distributed-optimizer="DO true" "use-distributed-optimizer true=DO true"
  "use-distributed-optimizer false=DO false" attention-backend=FL recompute-granularity=AC
  "recompute-granularity full=AC full" "recompute-granularity selective=AC sel"
  cpu-offloading="AC offload" cpu-offloading-num-layers=MP_AC_LAYERS
  recompute-num-layers=MP_AC_LAYERS optimizer-cpu-offload=OPTIMIZER_OFFLOAD
  optimizer-offload-fraction=OPTIMIZER_OFFLOAD save-interval=SAVE_INTERVAL
  eval-interval=SAVE_INTERVAL train-data-path=DATASET_PATH valid-data-path=VALID_DATASET_PATH
  load=PRETRAIN_CHECKPOINT_PATH train-iters=TRAIN_ITERS lr-warmup-iters=LR_WARMUP_ITERS
  save=OUTPUT_BASEPATH decoder-first-pipeline-num-layers=MP_PP0_LAYERS
  first-stage-layers=MP_PP0_LAYERS num-virtual-stages-per-pipeline-rank=MP_VP vp=MP_VP
  expert-model-parallel-size=MP_EP ep=MP_EP expert-tensor-parallel-size=MP_ETP etp=MP_ETP
  packing-buffer-size=MP_PACKING_BUFFER hf-config=MP_HF_PATH cluster-env="ENV dlc"
  "layout auto=TP auto" gpu=MP_GPU no-cluster-env="ENV dsw" nproc-per-node=NPROC_PER_NODE
)
for WORD in ${EXTRA[@]+"${EXTRA[@]}"}; do # who typed the flag reads the flag
  WORD=${WORD%%=*}
  for I in "${!CALLED[@]}"; do
    case ${CALLED[I]} in "${WORD#--}"[\ =]*) unset "CALLED[I]" ;; esac
  done
done
MEGATRON_VL_CALLED=$(IFS=';' && echo "${CALLED[*]}")
export MEGATRON_VL_CALLED

# Run from anywhere, installed or not.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

PYTHON=${PYTHON:-python}
command -v "$PYTHON" >/dev/null || refuse "there is no $PYTHON; set PYTHON to the Python that has the packages."
COMMAND=(
  "$PYTHON" -m megatron_vl train "${NODES[@]}"
  --model-size "$MODEL_SIZE"
  --global-batch-size "$GLOBAL_BATCH_SIZE"
  --seq-length "$SEQ_LEN"
  --max-padding-length "$PAD_LEN"
  --packing-buffer-size "${MP_PACKING_BUFFER:-0}"
  --train-iters "$TRAIN_ITERS"
  --lr "$LR"
  --min-lr "$MIN_LR"
  --lr-decay-style cosine
  --lr-warmup-iters "$LR_WARMUP_ITERS"
  --adam-beta1 0.9
  --adam-beta2 0.95
  --weight-decay 0.01
  --clip-grad 1.0
  --train-data-path "$DATASET_PATH"
  --valid-data-path "$VALID_DATASET_PATH"
  --eval-interval "$SAVE_INTERVAL"
  --save "$OUTPUT_BASEPATH/checkpoint/$NAME"
  --save-interval "$SAVE_INTERVAL"
  --tensorboard-dir "$OUTPUT_BASEPATH/tensorboard/$NAME"
  --metrics-file "$OUTPUT_BASEPATH/log/$NAME/metrics.jsonl"
  --log-interval 1
  "${OPTIONS[@]}" ${EXTRA[@]+"${EXTRA[@]}"}
)
printf '%q ' "${COMMAND[@]}" && echo
exec "${COMMAND[@]}"
