"""Chains of two contradicting tasks through the command line, as a user runs them, with one or several processes."""

import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from swift_cl.methods.registry import get_method
from tests.support import commands
from tests.support.train import CLASSES, FLAGS, METHOD_FLAGS, MODEL
from tests.support.tuners import TUNER_FLAGS

TASKS = ("first", "second")
STAGES = ("stage_1_first", "stage_2_second")
CLASS_FILES = (CLASSES / "2022.json", CLASSES / "2023.json")


class Cell(NamedTuple):
    """A method with a tuner; '' for the method's own first one."""

    method: str
    tuner: str = ""

    @property
    def name(self) -> str:
        """As ids of tests and folders have it."""
        return f"{self.method}-{self.tuner}" if self.tuner else self.method

    def run_dir(self, folder: Path) -> Path:
        """Where `run_chain(folder, ...)` leaves its stages."""
        return folder / f"runs{self.tuner and '-' + self.tuner}" / self.method


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_chain(
    folder: Path,
    cells: Sequence[Cell | str],
    processes: int,
    batch: int,
    train: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Train cells over the tasks `one.json` and `two.json` beside `folder` (see `contradicting_rows`), those that
    classify over two tasks of classes; all in one launch. What is finished in `folder` is not trained again.

    Args:
        cells: a name alone is a method with its own first tuner.
        train: further settings of the training; None as a value takes one out.
        env: further environment variables.
    """
    texts = (folder.parent / "one.json", folder.parent / "two.json")
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, bool], list[str]] = {}
    for cell in (Cell(cell) if isinstance(cell, str) else cell for cell in cells):
        groups.setdefault((cell.tuner, get_method(cell.method).classifies), []).append(cell.method)
    files = []
    for (tuner, classifies), methods in groups.items():
        data = CLASS_FILES if classifies else texts
        files.append(_write(folder, tuner, methods, data, classifies, _settings(tuner, processes, batch, train or {})))
    _run(files, processes, env or {})


def _settings(tuner: str, processes: int, batch: int, train: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        **FLAGS,
        "per_device_train_batch_size": batch,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lora_dropout": 0.0,
        "max_steps": 4,
        "save_steps": 100,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
        **({"tuner_type": tuner, **TUNER_FLAGS.get(tuner, {})} if tuner else {}),
        **train,
        "add_version": None,
    }
    if tuner == "full":
        settings["lora_rank"] = settings["lora_dropout"] = None
    return {key: value for key, value in settings.items() if value is not None}


def _write(
    folder: Path, tuner: str, methods: Sequence[str], data: Sequence[Path], classifies: bool, train: dict[str, Any]
) -> Path:
    name = ("classes" if classifies else "texts") + (tuner and f"-{tuner}")
    tasks = [{"name": task, "train": str(file), "test": str(file)} for task, file in zip(TASKS, data, strict=True)]
    scenario = {"scenario": "class_incremental"} if classifies else {}
    benchmark = {"name": name, "tasks": tasks, **scenario}
    (folder / f"{name}-benchmark.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))
    own = {method: dict(METHOD_FLAGS.get(method, {})) for method in methods}
    for method, flags in own.items():
        flags.pop(f"{method}_labels", None)  # the benchmark says them
    config = {
        "benchmark": f"{name}-benchmark.yaml",
        "model": str(MODEL),
        "output_dir": str(Cell("", tuner).run_dir(Path())),
        "method": list(methods),
        "train": train,
        "method_settings": {method: flags for method, flags in own.items() if flags},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def _run(files: Sequence[Path], processes: int, env: Mapping[str, str]) -> None:
    environment = {**commands.environment(), **env}
    if processes > 1:
        environment |= {"NPROC_PER_NODE": str(processes), "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", __name__, *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def main(files: Sequence[str]) -> None:
    """`swift-cl run --mode train_only` of several run files, with one launch of the training for all of them."""
    from swift_cl.workflow.config import load_config
    from swift_cl.workflow.run import prepare, train

    configs = [load_config(Path(file), []) for file in files]
    train([plan for config, benchmark in configs for plan in prepare(config, benchmark, overwrite=False)], False)


if __name__ == "__main__":
    main(sys.argv[1:])
