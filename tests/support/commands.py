"""Run files and commands as a user would write them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.train import FLAGS, METHOD_FLAGS, MODEL, NEWS, TASKS


def write_run_file(folder: Path, method: list[str], **train: Any) -> Path:
    """A run file over the first two news tasks with the small settings of the tests."""
    folder.mkdir(parents=True, exist_ok=True)
    benchmark = {
        "name": "two_years",
        "data_dir": str(NEWS),
        "tasks": [
            {"name": t, "train": f"{t}-train.json", "test": f"test_data/{t}-test.json", "system": f"News of {t}."}
            for t in TASKS
        ],
    }
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))
    settings = {**FLAGS, **train}
    settings.pop("add_version")
    config = {
        "benchmark": "benchmark.yaml",
        "model": str(MODEL),
        "output_dir": "runs",
        "method": method,
        "train": settings,
        "method_settings": METHOD_FLAGS,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def environment() -> dict[str, str]:
    """The environment of a command: one thread, no hub, nothing of a launcher or of a training in this process."""
    left_over = ("NPROC_PER_NODE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "TENSORBOARD_LOGGING_DIR")
    found = {k: v for k, v in os.environ.items() if k not in left_over}
    return {**found, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def swift_cl_command(*argv: str) -> list[str]:
    """`swift-cl` of this Python."""
    return [sys.executable, "-m", "swift_cl.cli.main", *argv]


def run_swift_cl(*argv: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; a failure shows what it printed."""
    done = subprocess.run(
        swift_cl_command(*argv), env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done
