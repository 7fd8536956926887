#!/bin/sh
# Serve the base model and the adapters of all stages of a run behind an OpenAI-compatible API, until Ctrl-C.
#   RUN_DIR=runs/qwen_gem sh evaluation/deploy.sh          # or: sh evaluation/deploy.sh runs/qwen_gem
# Settings (environment): RUN_DIR, MODEL (another copy of the base), INFER_BACKEND (pt or vllm), HOST, PORT, PYTHON,
# SERVER_PYTHON (an environment with vLLM), MAX_BATCH_SIZE, SERVER_ARGS (further flags of `swift deploy`).
# Further arguments go to `python -m swift_cl.cli.serve`, see --help.
set -eu

PYTHON=${PYTHON:-python}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-8000}
INFER_BACKEND=${INFER_BACKEND:-pt}

case ${1:-} in
    '' | -*)
        if [ -n "${RUN_DIR:-}" ]; then
            set -- "$RUN_DIR" "$@"
        elif [ -z "${1:-}" ]; then
            echo "deploy.sh: RUN_DIR is not set; RUN_DIR=runs/qwen_gem sh evaluation/deploy.sh" >&2
            exit 2
        fi
        ;;
esac
[ -z "${MODEL:-}" ] || set -- "$@" --model "$MODEL"
[ -z "${SERVER_PYTHON:-}" ] || set -- "$@" --server_python "$SERVER_PYTHON"
[ -z "${MAX_BATCH_SIZE:-}" ] || set -- "$@" --max_batch_size "$MAX_BATCH_SIZE"
[ -z "${SERVER_ARGS:-}" ] || set -- "$@" --server_args "$SERVER_ARGS"
# exec: signals reach the program that ends the server.
exec "$PYTHON" -m swift_cl.cli.serve --infer_backend "$INFER_BACKEND" --host "$HOST" --port "$PORT" "$@"
