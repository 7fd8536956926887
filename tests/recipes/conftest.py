"""Runs a recipe in dash with a `swift-cl` on PATH that only writes down how it was called."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from swift_cl.training.flags import flag_values
from tests.conftest import ROOT

SETTINGS = (
    *("MODEL", "MODEL_TYPE", "TEMPLATE", "DATA_DIR", "TASKS", "OUTPUT_DIR", "SEED", "DEVICE", "NPROC_PER_NODE"),
    *("DEEPSPEED", "EPOCHS", "BATCH_SIZE", "GRAD_ACCUM", "LR", "MAX_LENGTH", "TORCH_DTYPE", "TUNER_TYPE", "LORA_RANK"),
    *("LORA_ALPHA", "ATTN_IMPL", "SAVE_STEPS", "SYSTEM_PROMPT"),
)

# Writes NPROC_PER_NODE and its arguments, each ended by NUL, into a numbered file. `doctor` is asked for real where a
# test wants it; `resolve-adapter` answers as if the stage were finished.
FAKE = """#!/bin/sh
number=$(ls "$CALLS" | wc -l)
file="$CALLS/$(printf '%03d' "$number")"
printf '%s\\0' "${NPROC_PER_NODE-unset}" "$@" >"$file"
case $1 in
    doctor) [ -z "${REAL_DOCTOR:-}" ] || exec "$REAL_PYTHON" -m swift_cl.cli.main "$@" ;;
    resolve-adapter) printf '%s\\n' "$2/adapter" ;;
    sft) [ "${FAIL_AT:-}" != "$number" ] || exit 7 ;;
esac
"""


@dataclass(frozen=True)
class Call:
    """One call of `swift-cl`."""

    processes: str
    argv: list[str]

    @property
    def flags(self) -> dict[str, list[str]]:
        return flag_values(self.argv[1:])

    def flag(self, name: str) -> str | None:
        """The value that argparse would take: the last one."""
        values = self.flags.get(name)
        return " ".join(values) if values else None


@dataclass(frozen=True)
class Outcome:
    """What a recipe printed, and the calls it made."""

    code: int
    output: str
    errors: str
    calls: list[Call]

    def of(self, command: str) -> list[Call]:
        return [call for call in self.calls if call.argv[0] == command]


def clean_environment() -> dict[str, str]:
    """The environment without settings of a recipe."""
    return {name: value for name, value in os.environ.items() if name not in SETTINGS}


def shell() -> str:
    """dash, the strictest of the shells that are usually there; else whatever sh is."""
    return shutil.which("dash") or "sh"


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Outcome]:
    """recipe(name, *flags, **environment): run train/<name>.sh with the fake command."""
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    fake = tools / "swift-cl"
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def run(name: str, *flags: str, **environment: str) -> Outcome:
        shutil.rmtree(calls, ignore_errors=True)
        calls.mkdir()
        variables = {
            **clean_environment(),
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(calls),
            "REAL_PYTHON": sys.executable,
            "OUTPUT_DIR": str(tmp_path / "out"),
            **environment,
        }
        command = [shell(), str(ROOT / "train" / f"{name}.sh"), *flags]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path, check=False)
        made = []
        for file in sorted(calls.iterdir()):
            processes, *argv = file.read_bytes().decode().split("\0")[:-1]
            made.append(Call(processes, argv))
        return Outcome(done.returncode, done.stdout, done.stderr, made)

    return run
