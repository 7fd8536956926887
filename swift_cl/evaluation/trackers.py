"""Scores and metrics for TensorBoard, Weights & Biases or SwanLab: `swift-cl eval --report_to NAME ...`.

A step is a stage: step 0 is the base model, step k the model after the k-th task. Logged are

    <scorer>/<task>          a cell of the matrix; a cell that was not measured is left out
    <scorer>/mean_so_far     the mean over the tasks learned so far; left out where one of them was not measured
    <scorer>/metrics/<name>  the metrics of the whole run, at the last step

The trackers' own environment variables hold what is secret or says where to (WANDB_API_KEY, WANDB_MODE=offline, ...).
Losses come from ms-swift itself, by `--report_to` of the training.
"""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError, did_you_mean

Log = Callable[[int, Mapping[str, float]], None]
"""Takes a step and its values by name."""
FOLDER = "trackers"


def steps(results: Mapping[str, Any]) -> list[dict[str, float]]:
    """The values of each step of a results.json."""
    order = list(results["order"])
    found: list[dict[str, float]] = [{} for _ in range(len(order) + 1)]
    for scorer, entry in results["scorers"].items():
        rows = [entry["base"] or [None] * len(order), *entry["matrix"]]
        for step, row in enumerate(rows):
            cells = dict(zip(order, row, strict=True))
            found[step] |= {f"{scorer}/{task}": cell for task, cell in cells.items() if cell is not None}
            learned = [cells[task] for task in order[:step]]
            if learned and None not in learned:
                found[step][f"{scorer}/mean_so_far"] = math.fsum(learned) / len(learned)
        metrics = {name: value for name, value in entry["metrics"].items() if isinstance(value, int | float)}
        found[-1] |= {f"{scorer}/metrics/{name}": float(value) for name, value in metrics.items()}
    return found


@contextlib.contextmanager
def _tensorboard(folder: Path, name: str, config: Mapping[str, Any]) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)

    try:
        yield log
    finally:
        writer.close()


@contextlib.contextmanager
def _wandb(folder: Path, name: str, config: Mapping[str, Any]) -> Iterator[Log]:
    import wandb

    with wandb.init(name=name, dir=str(folder), config=dict(config), reinit="finish_previous") as run:
        yield lambda step, values: run.log(dict(values), step=step)


@contextlib.contextmanager
def _swanlab(folder: Path, name: str, config: Mapping[str, Any]) -> Iterator[Log]:
    import swanlab

    swanlab.init(experiment_name=name, logdir=str(folder), config=dict(config))
    try:
        yield lambda step, values: swanlab.log(dict(values), step=step)
    finally:
        swanlab.finish()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any]], contextlib.AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "swanlab": _swanlab,
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown or not installed.

    Raises:
        UserError: there is one.
    """
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(name, list(TRACKERS))
            raise UserError(f"--report_to {name!r} is unknown, allowed: {', '.join(TRACKERS)}{hint}")
        if find_spec(name) is None:
            raise UserError(f"--report_to {name}: the package is not installed; pip install {name}")


def track(results: Mapping[str, Any], run_dir: Path, names: Sequence[str]) -> None:
    """Log a run's results; what was logged before in the run's folder is replaced."""
    config = {key: results[key] for key in ("benchmark", "method", "model", "seed", "order")}
    for name in names:
        folder = run_dir / FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with TRACKERS[name](folder, str(results["name"]), config) as log:
            for step, values in enumerate(steps(results)):
                log(step, values)
