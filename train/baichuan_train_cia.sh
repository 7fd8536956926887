#!/bin/sh
# Baichuan2-7B-Chat, Large Continual Instruction Assistant: the yearly tasks chained. Settings: see common.sh.
set -eu
METHOD=cia
MODEL="${MODEL:-baichuan-inc/Baichuan2-7B-Chat}"
MODEL_TYPE="${MODEL_TYPE:-baichuan2}"
TEMPLATE="${TEMPLATE:-baichuan}"
# The published recipe says zero0, where bf16 keeps no fp32 weights for the moving average: zero1 does.
RECIPE_DEEPSPEED=zero1
. "$(dirname "$0")/common.sh"
train_chain "$@"
