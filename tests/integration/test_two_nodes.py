"""Two machines, played by two launchers on this one: the same command on each, told apart by NODE_RANK; and a run whose
next stage has another number of processes.

On demand (SWIFT_CL_DISTRIBUTED=all): four trainings with two processes each.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from swift_cl.io import read_json
from swift_cl.stages import load_run, load_stage
from tests.conftest import ROOT
from tests.support.chains import free_port
from tests.support.commands import environment, swift_cl_command, write_run_file
from tests.support.train import TASKS, stage_argv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("SWIFT_CL_DISTRIBUTED") != "all", reason="on demand: SWIFT_CL_DISTRIBUTED=all"),
]


def on_two_nodes(command: list[str], env: Mapping[str, str] | None = None) -> list["subprocess.CompletedProcess[str]"]:
    """The command on node 0 and node 1 at a time."""
    port = str(free_port())
    shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NPROC_PER_NODE": "1"}
    started = [
        subprocess.Popen(
            command,
            env={**environment(), **shared, "NODE_RANK": str(rank), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    done = []
    try:
        for process in started:
            out, errors = process.communicate(timeout=600)
            done.append(subprocess.CompletedProcess(command, process.returncode, out, errors))
    finally:
        for process in started:
            process.kill()
    for node, result in enumerate(done):
        assert result.returncode == 0, f"node {node}: {result.stdout[-2000:]}{result.stderr[-3000:]}"
    return done


def test_sft(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    argv = stage_argv("ewc", TASKS[0], folder, per_device_train_batch_size=2, ddp_backend="gloo")
    on_two_nodes(swift_cl_command("sft", *argv))
    assert load_stage(folder).train["processes"] == 2
    for result in on_two_nodes(swift_cl_command("sft", *argv)):
        assert f"stage {TASKS[0]} is finished already" in result.stdout


def test_run(tmp_path: Path) -> None:
    """Node 0 writes the run and would evaluate it; with --overwrite it alone deletes."""
    file = write_run_file(tmp_path, ["seq"], per_device_train_batch_size=2, ddp_backend="gloo", max_steps=2)
    command = swift_cl_command("run", str(file), "--mode", "train_only")
    zero, one = on_two_nodes(command)
    assert "node 1 of 2: done" in one.stdout
    assert "node 1 of 2" not in zero.stdout
    run = tmp_path / "runs" / "seq"
    before = load_run(run)
    assert [stage.train["processes"] for stage in before.stages] == [2, 2]
    assert len(read_json(run / "provenance.json")["calls"]) == 1
    on_two_nodes([*command, "--overwrite"])
    assert [stage.weights_sha256 for stage in load_run(run).stages] == [stage.weights_sha256 for stage in before.stages]


def test_recipe(tmp_path: Path) -> None:
    settings = {
        "DEVICE": "cpu",
        "MODEL": str(ROOT / "assets" / "tiny_base"),
        "TASKS": "2022 2023",
        "OUTPUT_DIR": str(tmp_path / "out"),
        "EPOCHS": "1",
        "BATCH_SIZE": "16",
        "LORA_RANK": "4",
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    recipe = ["sh", str(ROOT / "train" / "qwen_train_lora.sh"), "--max_steps", "2"]
    on_two_nodes(recipe, {**settings, "PATH": path, "PYTHONPATH": str(ROOT)})
    assert [stage.train["processes"] for stage in load_run(tmp_path / "out").stages] == [2, 2]


def test_the_next_stage_with_another_number_of_processes(tmp_path: Path) -> None:
    """The command of a run that was stopped between two stages continues it with two processes instead of one."""
    file = write_run_file(tmp_path, ["seq"], per_device_train_batch_size=2, max_steps=2)
    command = swift_cl_command("run", str(file), "--mode", "train_only")
    alone = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert alone.returncode == 0, alone.stderr[-3000:]
    run = tmp_path / "runs" / "seq"
    first, second = load_run(run).stages
    shutil.rmtree(second.dir)
    two = {**environment(), "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    more = subprocess.run(
        [*command, "--set", "train.ddp_backend=gloo"], env=two, capture_output=True, text=True, timeout=600
    )
    assert more.returncode == 0, more.stderr[-3000:]
    assert "stage 2022 is finished already" in more.stdout
    assert "4 rows a step, the stage before had 2" in more.stdout + more.stderr
    again = load_run(run).stages
    assert again[0].weights_sha256 == first.weights_sha256 == again[1].started_from["weights_sha256"]  # type: ignore[index]
    assert [stage.train["processes"] for stage in again] == [1, 2]
