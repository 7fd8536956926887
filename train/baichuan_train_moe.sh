#!/bin/sh
# Baichuan2-7B-Chat, a mixture of LoRA experts (moelora): the yearly tasks chained. Settings: see common.sh.
set -eu
METHOD=moe_lora
TUNER_TYPE="${TUNER_TYPE:-moelora}"
MODEL="${MODEL:-baichuan-inc/Baichuan2-7B-Chat}"
MODEL_TYPE="${MODEL_TYPE:-baichuan2}"
TEMPLATE="${TEMPLATE:-baichuan}"
RECIPE_DEEPSPEED=zero0
. "$(dirname "$0")/common.sh"
train_chain "$@"
