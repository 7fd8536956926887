#!/bin/sh
# Baichuan2-7B-Chat, plain sequential LoRA: the yearly tasks chained. Settings: see common.sh.
set -eu
METHOD=seq
MODEL="${MODEL:-baichuan-inc/Baichuan2-7B-Chat}"
MODEL_TYPE="${MODEL_TYPE:-baichuan2}"
TEMPLATE="${TEMPLATE:-baichuan}"
RECIPE_DEEPSPEED=zero0
. "$(dirname "$0")/common.sh"
train_chain "$@"
