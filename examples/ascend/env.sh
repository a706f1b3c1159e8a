# What the scripts of this folder begin with: CANN's own variables where they are not set yet, and
# of those that MindSpeed-MM's scripts set what no user has set, told in one line. megatron-vl train
# adds what it needs itself. For source, not for bash.
if [ -n "${ASCEND_SET_ENV:-}" ] && [ ! -f "$ASCEND_SET_ENV" ]; then
  echo "$0: ASCEND_SET_ENV is $ASCEND_SET_ENV, which is no file; give CANN's set_env.sh." >&2
  exit 2
fi
if [ -z "${ASCEND_TOOLKIT_HOME:-}" ]; then
  for SET_ENV in "${ASCEND_SET_ENV:-}" /usr/local/Ascend/ascend-toolkit/set_env.sh \
    /usr/local/Ascend/cann/set_env.sh; do
    if [ -f "$SET_ENV" ]; then
      set +u # it reads variables that may not be set
      # shellcheck disable=SC1090
      source "$SET_ENV"
      set -u
      break
    fi
  done
fi

GIVEN=""
for VALUE in TASK_QUEUE_ENABLE=2 COMBINED_ENABLE=1 CPU_AFFINITY_CONF=1 ASCEND_GLOBAL_LOG_LEVEL=3; do
  NAME=${VALUE%%=*}
  if [ -z "${!NAME+set}" ]; then
    export "${VALUE?}"
    GIVEN="$GIVEN $VALUE"
  fi
done
if [ -n "$GIVEN" ]; then echo "$0: set$GIVEN, which nothing had set" >&2; fi
