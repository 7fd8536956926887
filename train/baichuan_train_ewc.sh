#!/bin/sh
# Baichuan2-7B-Chat, Elastic Weight Consolidation: the yearly tasks chained. Settings: see common.sh.
set -eu
METHOD=ewc
MODEL="${MODEL:-baichuan-inc/Baichuan2-7B-Chat}"
MODEL_TYPE="${MODEL_TYPE:-baichuan2}"
TEMPLATE="${TEMPLATE:-baichuan}"
RECIPE_DEEPSPEED=zero1
. "$(dirname "$0")/common.sh"
train_chain "$@"
