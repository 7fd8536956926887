#!/bin/sh
# InternLM2.5-7B-chat, Large Continual Instruction Assistant: the yearly tasks chained. Settings: see common.sh.
set -eu
METHOD=cia
MODEL="${MODEL:-Shanghai_AI_Laboratory/internlm2_5-7b-chat}"
MODEL_TYPE="${MODEL_TYPE:-internlm2}"
TEMPLATE="${TEMPLATE:-internlm2}"
# The published recipe says zero0, where bf16 keeps no fp32 weights for the moving average: zero1 does.
RECIPE_DEEPSPEED=zero1
. "$(dirname "$0")/common.sh"
train_chain "$@"
