#!/bin/sh
# InternLM2.5-7B-chat, a mixture of LoRA experts (moelora): the yearly tasks chained. Settings: see common.sh.
set -eu
METHOD=moe_lora
TUNER_TYPE="${TUNER_TYPE:-moelora}"
MODEL="${MODEL:-Shanghai_AI_Laboratory/internlm2_5-7b-chat}"
MODEL_TYPE="${MODEL_TYPE:-internlm2}"
TEMPLATE="${TEMPLATE:-internlm2}"
RECIPE_DEEPSPEED=zero0
. "$(dirname "$0")/common.sh"
train_chain "$@"
