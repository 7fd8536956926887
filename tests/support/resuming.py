"""One stage stopped in its middle, and continued by another number of processes or another engine."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support import commands
from tests.support.chains import free_port
from tests.support.train import NEWS, TASKS, adapter, stage_argv

ROWS = 11
"""Not a multiple of 2: two processes leave one out; three steps of 4 an epoch, the last one short."""
SETTINGS: dict[str, Any] = {
    # Adam's moments are what a checkpoint must carry on. A large epsilon: dividing by tiny moments magnifies rounding.
    "adam_epsilon": 1e-3,
    "learning_rate": 1e-2,
    "lora_dropout": 0.0,
    "max_steps": 8,
    "save_steps": 2,
    "max_grad_norm": 0.0,
}
FP32 = {"fp16": False, "bf16": False}


def rows_file(folder: Path) -> Path:
    """The training rows of the second task."""
    rows = json.loads((NEWS / f"{TASKS[1]}-train.json").read_text(encoding="utf-8"))[:ROWS]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def layout(processes: int, engine: str | None = None, accumulation: int = 1) -> dict[str, Any]:
    """Flags for 4 rows a step."""
    spread = {
        "per_device_train_batch_size": 4 // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "ddp_backend": "gloo" if processes > 1 else None,
    }
    flag = "fsdp" if engine == "fsdp2" else "deepspeed"
    return {**spread, **({flag: engine, **FP32} if engine else {})}


def train(
    method: str, folder: Path, previous: Path, rows: Path, processes: int, engine: str | None = None, **changes: Any
) -> "subprocess.CompletedProcess[str]":
    """`swift-cl sft` with this many processes; what is in the folder is continued."""
    settings = {
        **SETTINGS,
        "dataset": str(rows),
        **layout(processes, engine, changes.pop("accumulation", 1)),
        **changes,
    }
    argv = stage_argv(method, TASKS[1], folder, previous, **settings)
    return launch(argv, processes, {"DS_ACCELERATOR": "cpu"} if engine else {})


def launch(argv: list[str], processes: int, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """`swift-cl sft` with these flags."""
    environment = {**commands.environment(), **(env or {})}
    # torchrun for DeepSpeed with one process too: it finds its rank in the environment.
    if processes > 1 or (env and "DS_ACCELERATOR" in env):
        environment |= {"NPROC_PER_NODE": str(processes), "MASTER_PORT": str(free_port())}
    return subprocess.run(
        commands.swift_cl_command("sft", *argv),
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def stop_after(folder: Path, step: int, copy: Path) -> Path:
    """A copy of a stage as it was when it had done `step` steps."""
    shutil.copytree(folder, copy, symlinks=True)
    for name in ("stage.json", "adapter", "cl_state", "last-checkpoint"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for checkpoint in copy.glob("checkpoint-*"):
        if int(checkpoint.name.partition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    return copy


def apart(start: Path, one: Path, two: Path) -> float:
    """How far two trainings from `start` are apart, relative to what they moved."""
    a, b, origin = adapter(one), adapter(two), adapter(start)
    assert a.keys() == b.keys() == origin.keys()
    moved = max((a[name] - origin[name]).abs().max().item() for name in a)
    assert moved > 0
    return float(max((a[name] - b[name]).abs().max().item() for name in a) / moved)
