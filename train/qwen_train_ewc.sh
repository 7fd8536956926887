#!/bin/sh
# Qwen2.5-7B, Elastic Weight Consolidation: the yearly tasks chained. Settings: see common.sh.
set -eu
METHOD=ewc
MODEL="${MODEL:-Qwen/Qwen2.5-7B}"
MODEL_TYPE="${MODEL_TYPE:-qwen2}"
TEMPLATE="${TEMPLATE:-qwen2_5}"
RECIPE_DEEPSPEED=zero1
. "$(dirname "$0")/common.sh"
train_chain "$@"
