# shellcheck shell=sh
# Sourced by quickstart.sh and tests/run.sh: makes `swift-cl` available.
#
# An active virtual environment (or conda) is used as it is; else .venv is made in the checkout. Installs only what was
# not installed for this setup.py before, so that a second time needs no network. Settings: PYTHON (default python3), TORCH (what to install where torch is
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
    missing=""
    for extra in $(echo "$1" | tr ',' ' '); do
        grep -qxF "$(pwd) $extra $(cksum <setup.py)" "$stamp" 2>/dev/null || missing="$missing $extra"
    done
    if [ -n "$missing" ]; then
        echo "swift_cl: installing into $prefix (a few minutes the first time)"
        python -c 'import torch' 2>/dev/null || python -m pip install --quiet "$TORCH"
        python -m pip install --quiet --editable ".[$1]"
        for extra in $missing; do echo "$(pwd) $extra $(cksum <setup.py)" >>"$stamp"; done
    fi
}
