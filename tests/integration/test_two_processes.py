"""Two processes (DDP, gloo) compute what one process computes, for every registered method."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from swift_cl.io import load_method_state
from swift_cl.methods.registry import methods
from tests.support.train import FLAGS, METHOD_FLAGS, MODEL, adapter, assert_equal_up_to_rounding, contradicting_rows

pytestmark = pytest.mark.slow
METHODS = sorted(methods())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_chain(folder: Path, names: list[str], processes: int, batch: int) -> None:
    """Train methods over two contradicting tasks, through the command line, as a user would."""
    one, two = folder.parent / "one.json", folder.parent / "two.json"
    benchmark = {
        "name": "contradiction",
        "tasks": [
            {"name": "first", "train": str(one), "test": str(one)},
            {"name": "second", "train": str(two), "test": str(two)},
        ],
    }
    folder.mkdir()
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))
    train: dict[str, Any] = {
        **FLAGS,
        "per_device_train_batch_size": batch,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lora_dropout": 0.0,
        "max_steps": 4,
        "save_steps": 100,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
    }
    for key in ("add_version",):
        del train[key]
    config = {
        "benchmark": "benchmark.yaml",
        "model": str(MODEL),
        "output_dir": "runs",
        "method": names,
        "train": train,
        "method_settings": METHOD_FLAGS,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("NPROC_PER_NODE", None)
    if processes > 1:
        environment |= {"NPROC_PER_NODE": str(processes), "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "swift_cl.cli.main", "run", str(folder / "run.yaml"), "--mode", "train_only"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def _method_of(item: Any) -> str:
    return str(item.callspec.params["method"]) if hasattr(item, "callspec") else "replay"


def _runs_here(item: Any) -> bool:
    return item.path == Path(__file__) and "runs" in item.fixturenames


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs in one process and in two, of the methods whose tests were asked for (`-k NAME`) and of seq."""
    asked = {_method_of(item) for item in request.session.items if _runs_here(item)}
    names = sorted(asked | {"seq"})
    folder = tmp_path_factory.mktemp("processes")
    contradicting_rows(folder)
    run_chain(folder / "one", names, processes=1, batch=4)
    run_chain(folder / "two", names, processes=2, batch=2)
    return folder / "one" / "runs", folder / "two" / "runs"


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("seq", "gem")])
def test_second_task_differs_from_seq(runs: tuple[Path, Path], method: str) -> None:
    """A method that changes nothing on the second task would be a name without an effect.

    For gem, which acts only where a constraint is violated, these steps are too few: it has its test in the matrix.
    """
    ours, plain = (adapter(runs[0] / name / "stage_2_second") for name in (method, "seq"))
    assert any(not torch.equal(ours[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(runs: tuple[Path, Path], method: str) -> None:
    one, two = (run / method / "stage_2_second" for run in runs)
    assert_equal_up_to_rounding(runs[0] / method / "stage_1_first", one, two)


@pytest.mark.parametrize("method", METHODS)
def test_state_of_two_processes_equals_one(runs: tuple[Path, Path], method: str) -> None:
    """Rows drawn and stored are the same; statistics agree to rounding."""
    folders = [run / method / "stage_1_first" / "cl_state" for run in runs]
    if not (folders[0] / f"{method}.json").is_file():
        pytest.skip(f"{method} keeps no state")
    one, two = (load_method_state(folder, method) for folder in folders)
    assert one.rows == two.rows
    for name, tensor in one.tensors.items():
        assert (tensor - two.tensors[name]).abs().max().item() <= 1e-3 * max(1.0, tensor.abs().max().item()), name


def test_replay_draws_the_same_rows(runs: tuple[Path, Path]) -> None:
    files = [run / "replay" / "stage_2_second" / "cl_data" / "train.jsonl" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()
    records = [run / "replay" / "stage_2_second" / "cl_state" / "replay.manifest.json" for run in runs]
    existing = [path for path in records if path.is_file()]
    if existing:
        assert records[0].read_bytes() == records[1].read_bytes()
