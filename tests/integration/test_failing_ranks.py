"""A rank that fails ends all ranks soon, with one line that names it; a rank that is slow loses nothing."""

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from swift_cl.io import read_json
from tests.conftest import ROOT
from tests.support.chains import free_port
from tests.support.commands import swift_cl_command
from tests.support.faulty import FAULT, STAMP
from tests.support.plugins import installed
from tests.support.train import TASKS, adapter, stage_argv

pytestmark = pytest.mark.slow
ALL = os.environ.get("SWIFT_CL_DISTRIBUTED") == "all"
on_demand = pytest.mark.skipif(not ALL, reason="on demand: SWIFT_CL_DISTRIBUTED=all")
MINUTE = 60.0


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    source = ROOT / "tests" / "support" / "faulty.py"
    return installed(tmp_path_factory.mktemp("site"), source, "faulty", "Faulty")


def train(plugin: dict[str, str], folder: Path, fault: str = "nowhere 0 raise") -> "subprocess.CompletedProcess[str]":
    """A stage of 4 steps on two ranks; a fault is `PLACE RANK HOW`."""
    settings = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "lora_dropout": 0.0}
    argv = stage_argv("faulty", TASKS[0], folder, **settings)
    environment = {
        **plugin,
        "NPROC_PER_NODE": "2",
        "MASTER_PORT": str(free_port()),
        **({FAULT: fault} if fault else {}),
    }
    return subprocess.run(
        swift_cl_command("sft", *argv), env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def running(folder: Path) -> list[int]:
    """Processes that have the folder in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or []):
            found.append(process.pid)
    return found


@pytest.mark.parametrize(
    ("at", "rank", "how"),
    [
        ("gradients", 1, "raise"),
        pytest.param("gradients", 1, "die", marks=on_demand),
        pytest.param("prepare_task", 0, "raise", marks=on_demand),
        pytest.param("end_task", 0, "raise", marks=on_demand),
        pytest.param("end_task", 1, "raise", marks=on_demand),
    ],
)
def test_a_rank_that_fails_ends_all(plugin: dict[str, str], tmp_path: Path, at: str, rank: int, how: str) -> None:
    folder = tmp_path / "stage"
    done = train(plugin, folder, f"{at} {rank} {how}")
    assert time.time() - read_json(folder / STAMP) < MINUTE
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("swift-cl: ")]
    expected = [f"rank {rank} of 2: ValueError: injected in {at}; the traceback is above"]
    if how == "die":
        # It says nothing itself; the other one does, if torchrun leaves it the time.
        lost = "rank 0 of 2: lost the connection to another rank, which was killed (out of memory?) or whose machine is"
        expected = [f"{lost} gone", "the training ended with exit code 1; its output is above"]
    assert lines[-1] in [f"swift-cl: failed: {text}" for text in expected]
    assert running(folder) == []
    assert not (folder / "stage.json").exists()
    assert rank == 1 or not list(folder.glob("cl_state/faulty.json"))
    if ALL:
        again = train(plugin, folder)
        assert again.returncode == 0, again.stderr[-3000:]
        whole = tmp_path / "whole"
        assert train(plugin, whole).returncode == 0
        assert_same(folder, whole)


@on_demand
def test_a_rank_that_is_slow_loses_nothing(plugin: dict[str, str], tmp_path: Path) -> None:
    slow, whole = tmp_path / "slow", tmp_path / "whole"
    done = train(plugin, slow, "gradients 1 20")
    assert done.returncode == 0, done.stderr[-3000:]
    assert train(plugin, whole).returncode == 0
    assert_same(slow, whole)


def assert_same(one: Path, two: Path) -> None:
    a, b = adapter(one), adapter(two)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
