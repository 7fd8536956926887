"""Chains of two contradicting tasks through the command line, as a user runs them, with one or several processes."""

import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support import commands
from tests.support.train import FLAGS, METHOD_FLAGS, MODEL

STAGES = ("stage_1_first", "stage_2_second")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_chain(
    folder: Path,
    methods: Sequence[str],
    processes: int,
    batch: int,
    train: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Train methods over the tasks `one.json` and `two.json` beside `folder` (see `contradicting_rows`).

    Args:
        train: further settings of the training; None as a value takes one out.
        env: further environment variables.
    """
    one, two = folder.parent / "one.json", folder.parent / "two.json"
    benchmark = {
        "name": "contradiction",
        "tasks": [
            {"name": "first", "train": str(one), "test": str(one)},
            {"name": "second", "train": str(two), "test": str(two)},
        ],
    }
    folder.mkdir(parents=True)
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))
    settings: dict[str, Any] = {
        **FLAGS,
        "per_device_train_batch_size": batch,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lora_dropout": 0.0,
        "max_steps": 4,
        "save_steps": 100,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
        **(train or {}),
        "add_version": None,
    }
    config = {
        "benchmark": "benchmark.yaml",
        "model": str(MODEL),
        "output_dir": "runs",
        "method": list(methods),
        "train": {key: value for key, value in settings.items() if value is not None},
        "method_settings": {name: flags for name, flags in METHOD_FLAGS.items() if name in methods},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {**commands.environment(), **(env or {})}
    if processes > 1:
        environment |= {"NPROC_PER_NODE": str(processes), "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "swift_cl.cli.main", "run", str(folder / "run.yaml"), "--mode", "train_only"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
