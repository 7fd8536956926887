"""What two processes generate is, byte for byte, what one generates."""

import os
import subprocess
from pathlib import Path

import pytest

from swift_cl.io import read_jsonl
from tests.support import commands
from tests.support.chains import free_port
from tests.support.train import TASKS, stage_argv, train_stage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("SWIFT_CL_DISTRIBUTED") != "all", reason="takes two minutes: SWIFT_CL_DISTRIBUTED=all"
    ),
]


def stage_in(processes: int, folder: Path, previous: Path) -> None:
    """A stage of lamol whose candidates make several batches."""
    argv = stage_argv(
        "lamol",
        TASKS[1],
        folder,
        previous,
        max_steps=1,
        lamol_gen_batch_size=5,
        per_device_train_batch_size=4 // processes,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
    )
    env = commands.environment() | ({"NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())} if processes > 1 else {})
    done = subprocess.run(
        commands.swift_cl_command("sft", *argv), env=env, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_two_processes_generate_what_one_generates(tmp_path: Path) -> None:
    train_stage("lamol", TASKS[0], tmp_path / "1", max_steps=1)
    for processes in (1, 2):
        stage_in(processes, tmp_path / f"{processes} processes", tmp_path / "1")
    one, two = (tmp_path / f"{processes} processes" / "cl_data" for processes in (1, 2))
    (answers,) = (one / "lamol" / "rounds").glob("r0-*.jsonl")
    assert len(read_jsonl(answers)) > 10, "three batches and more"
    assert len({row["text"] for row in read_jsonl(answers)}) > 3, "they are drawn"
    names = sorted(path.relative_to(one) for path in one.rglob("*.json*"))
    assert names == sorted(path.relative_to(two) for path in two.rglob("*.json*"))
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
