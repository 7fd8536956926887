#!/bin/sh
# The whole story on a laptop: set up, learn four years of news with plain sequential tuning and again with replay,
# serve all stages on one server, ask every question, score, print one table.
#
#   sh train/quickstart.sh [flags of `swift-cl run`]      e.g. --set seed=7 --output_dir runs/seed7
#
# Stopped and started again, it continues where it stopped.
set -eu
cd "$(dirname "$0")/.."
. train/environment.sh
prepare_environment offline
# Nothing here needs a hub: the model, the data and the sentence encoder are on disk.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" MODELSCOPE_OFFLINE="${MODELSCOPE_OFFLINE:-1}"
exec swift-cl run train/quickstart.yaml "$@"
