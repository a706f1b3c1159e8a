#!/bin/sh
# Stands for python where a script ends with `exec python ...`: writes down what it was given.
printf '%s\0' "$@" >"$WORDS_OF"
env -0 >"$WORDS_OF.environment"
