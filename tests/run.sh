#!/bin/sh
# All tests that need no GPU: sets up what they need, then style, types, scripts and pytest.
#
#   sh tests/run.sh [flags of pytest]      e.g. sh tests/run.sh tests/unit -q
#   sh tests/run.sh --distributed          every method under every engine, failing processes, nodes (over an hour)
#
# Every part runs, whatever the others say; the exit code is not 0 if one failed. Settings: PYTHON and TORCH (see
# train/environment.sh), OMP_NUM_THREADS (default 2: many small processes), SWIFT_CL_VLLM_PYTHON (a Python with vLLM and
# ms-swift, for the tests marked vllm), SWIFT_CL_SHARED (real small model and task data, default ../shared).
set -eu
cd "$(dirname "$0")/.."
. train/environment.sh
prepare_environment dev,offline,scorers,deepspeed,harness,trackers
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

if [ "${1:-}" = "--distributed" ]; then
    shift
    export SWIFT_CL_DISTRIBUTED=all
    code=0
    python -m pytest tests/distributed tests/integration/test_two_processes.py tests/integration/test_failing_ranks.py \
        tests/integration/test_two_nodes.py "$@" || code=$?
    python -m tests.support.engine_cells # which declared cells of the README's table were seen
    exit "$code"
fi

failed=""
# part NAME COMMAND...
part() {
    name="$1"
    shift
    echo "== $name"
    "$@" || failed="$failed, $name"
}

style() { python -m ruff "$@" swift_cl tests train evaluation datasets assets setup.py; }

scripts() {
    if ! command -v shellcheck >/dev/null 2>&1; then
        echo "skipped: shellcheck is not installed"
        return 0
    fi
    shellcheck train/*.sh evaluation/*.sh tests/*.sh .ci/run
}

part "ruff check" style check
part "ruff format" style format --check
part "mypy" python -m mypy
part "shellcheck" scripts
part "pytest" python -m pytest -m "not gpu" "$@"

if [ -n "$failed" ]; then
    echo "tests/run.sh: failed: ${failed#, }" >&2
    exit 1
fi
