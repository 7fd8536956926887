# shellcheck shell=sh
# Sourced by quickstart.sh and tests/run.sh: makes `swift-cl` available.
#
# An active virtual environment (or conda) is used as it is; else .venv is made in the checkout. Installs only when
# setup.py changed since the last time. Settings: PYTHON (default python3), TORCH (what to install where torch is
# missing; the default has a small CPU build on most indexes).

PYTHON="${PYTHON:-python3}"
TORCH="${TORCH:-torch==2.13.0}"

# prepare_environment EXTRAS: EXTRAS is a comma-separated list of the extras in setup.py.
prepare_environment() {
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            echo "swift_cl: making the virtual environment .venv"
            "$PYTHON" -m venv .venv
        fi
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
    prefix="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    stamp="$prefix/.swift_cl_installed"
    wanted="$(pwd) $1 $(cksum <setup.py)"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "swift_cl: installing into $prefix (a few minutes the first time)"
        python -c 'import torch' 2>/dev/null || python -m pip install --quiet "$TORCH"
        python -m pip install --quiet --editable ".[$1]"
        printf '%s' "$wanted" >"$stamp"
    fi
}
