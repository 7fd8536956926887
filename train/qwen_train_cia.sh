#!/bin/sh
# Qwen2.5-7B, Large Continual Instruction Assistant: the yearly tasks chained. Settings: see common.sh.
set -eu
METHOD=cia
MODEL="${MODEL:-Qwen/Qwen2.5-7B}"
MODEL_TYPE="${MODEL_TYPE:-qwen2}"
TEMPLATE="${TEMPLATE:-qwen2_5}"
# The published recipe says zero0, where bf16 keeps no fp32 weights for the moving average: zero1 does.
RECIPE_DEEPSPEED=zero1
. "$(dirname "$0")/common.sh"
train_chain "$@"
