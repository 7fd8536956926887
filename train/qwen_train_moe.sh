#!/bin/sh
# Qwen2.5-7B, a mixture of LoRA experts (moelora): the yearly tasks chained. Settings: see common.sh.
set -eu
METHOD=moe_lora
TUNER_TYPE="${TUNER_TYPE:-moelora}"
MODEL="${MODEL:-Qwen/Qwen2.5-7B}"
MODEL_TYPE="${MODEL_TYPE:-qwen2}"
TEMPLATE="${TEMPLATE:-qwen2_5}"
RECIPE_DEEPSPEED=zero0
. "$(dirname "$0")/common.sh"
train_chain "$@"
