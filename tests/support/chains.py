"""Chains of two contradicting tasks through the command line, as a user runs them, with one or several processes."""

import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from swift_cl.methods.registry import get_method
from tests.support import commands
from tests.support.train import CLASSES, FLAGS, METHOD_FLAGS, MODEL

TASKS = ("first", "second")
STAGES = ("stage_1_first", "stage_2_second")
CLASS_FILES = (CLASSES / "2022.json", CLASSES / "2023.json")


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
    """Train methods over the tasks `one.json` and `two.json` beside `folder` (see `contradicting_rows`); those that
    classify over two tasks of classes.

    Args:
        train: further settings of the training; None as a value takes one out.
        env: further environment variables.
    """
    texts = (folder.parent / "one.json", folder.parent / "two.json")
    classifiers = [name for name in methods if get_method(name).classifies]
    others = [name for name in methods if name not in classifiers]
    folder.mkdir(parents=True, exist_ok=True)
    for name, own, files in (("texts", others, texts), ("classes", classifiers, CLASS_FILES)):
        if own:
            scenario = {"scenario": "class_incremental"} if own is classifiers else {}
            _write(folder, name, own, files, scenario, processes, batch, train or {})
            _run(folder / f"{name}.yaml", processes, env or {})


def _write(
    folder: Path,
    name: str,
    methods: Sequence[str],
    files: Sequence[Path],
    scenario: Mapping[str, str],
    processes: int,
    batch: int,
    train: Mapping[str, Any],
) -> None:
    tasks = [{"name": task, "train": str(file), "test": str(file)} for task, file in zip(TASKS, files, strict=True)]
    benchmark = {"name": name, "tasks": tasks, **scenario}
    (folder / f"{name}-benchmark.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))
    settings: dict[str, Any] = {
        **FLAGS,
        "per_device_train_batch_size": batch,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lora_dropout": 0.0,
        "max_steps": 4,
        "save_steps": 100,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
        **train,
        "add_version": None,
    }
    own = {method: dict(METHOD_FLAGS.get(method, {})) for method in methods}
    for method, flags in own.items():
        flags.pop(f"{method}_labels", None)  # the benchmark says them
    config = {
        "benchmark": f"{name}-benchmark.yaml",
        "model": str(MODEL),
        "output_dir": "runs",
        "method": list(methods),
        "train": {key: value for key, value in settings.items() if value is not None},
        "method_settings": {method: flags for method, flags in own.items() if flags},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def _run(file: Path, processes: int, env: Mapping[str, str]) -> None:
    environment = {**commands.environment(), **env}
    if processes > 1:
        environment |= {"NPROC_PER_NODE": str(processes), "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "swift_cl.cli.main", "run", str(file), "--mode", "train_only"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
