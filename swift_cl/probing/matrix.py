"""From features to the matrix P of each kind of probe, and to P - R.

RUN_DIR/probing.json (schema 1): `scope`, `settings`, `order`, and by kind `base` (scope `all` alone), `matrix` (a row a
stage, a column a task, percent; null where the probe has not seen the task's classes), `seen` (as in results.json), and
`gap` {scorer: P - R} where results.json is there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from swift_cl.errors import UserError
from swift_cl.evaluation.metrics import Cell
from swift_cl.evaluation.plan import Grid, GridOptions, Target, load_grid
from swift_cl.evaluation.results import RESULTS_FILE
from swift_cl.evaluation.scenarios import seen_accuracy
from swift_cl.io import read_json, write_json
from swift_cl.probing.features import Features, Labelled
from swift_cl.probing.probes import ProbeSettings, fit
from swift_cl.stream.benchmark import Task
from swift_cl.stream.benchmark_file import CLASSIFICATION
from swift_cl.stream.rows import Row

PROBING_SCHEMA = 1
PROBING_FILE = "probing.json"
SCOPES = ("seen", "all")


def probe_run(
    run_dir: Path,
    options: GridOptions,
    kinds: Sequence[str],
    scope: str,
    settings: ProbeSettings,
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """Probe every stage of a run, and write probing.json.

    Args:
        scope: `seen` trains a stage's probes on the tasks that it has learned, `all` on all tasks.

    Raises:
        UserError: the benchmark is no classification, or a training row's answer is no label.
    """
    grid = load_grid(run_dir, options)
    if not grid.labels:
        raise UserError(f"{grid.benchmark.path}: probing needs classes, so a scenario: {' or '.join(CLASSIFICATION)}")
    reader = Features(grid, notify)
    targets: list[Target | None] = [grid.base, *grid.stages] if scope == "all" else list(grid.stages)
    rows: dict[str, list[list[Cell]]] = {kind: [] for kind in kinds}
    for position, target in enumerate(targets):
        learned = len(grid.tasks) if scope == "all" else position + 1
        found = {} if target is None else _probe(grid, reader, target, learned, kinds, settings)
        for kind in kinds:
            rows[kind].append(found.get(kind, [None] * len(grid.tasks)))
    counts = [[len(own) for own in grid.rows]] * len(grid.tasks)
    first = 1 if scope == "all" else 0
    value = {
        "schema": PROBING_SCHEMA,
        "benchmark": grid.benchmark.name,
        "scenario": grid.benchmark.scenario,
        "method": grid.run.method,
        "order": [task.name for task in grid.tasks],
        "scope": scope,
        "settings": asdict(settings),
        "kinds": {
            kind: {
                **({"base": matrix[0]} if first else {}),
                "matrix": matrix[first:],
                "seen": seen_accuracy(matrix[first:], counts),
                "gap": _gaps(grid.run.dir / RESULTS_FILE, matrix[first:], [task.name for task in grid.tasks]),
            }
            for kind, matrix in rows.items()
        },
    }
    write_json(grid.run.dir / PROBING_FILE, value)
    return value


def _probe(
    grid: Grid, reader: Features, target: Target, learned: int, kinds: Sequence[str], settings: ProbeSettings
) -> dict[str, list[Cell]]:
    """By kind a row of P: percent of each task's test rows that the probe gets right."""
    tasks = grid.tasks[:learned]
    train = [reader.of(target, task, "train", _checked(reader, task)) for task in tasks]
    test = [reader.of(target, task, "test", rows) for task, rows in zip(tasks, grid.rows, strict=False)]
    unseen: list[Cell] = [None] * (len(grid.tasks) - learned)
    groups = [[number] for number in range(learned)] if grid.benchmark.scenario == "task_incremental" else None
    found = {}
    for kind in kinds:
        row: list[Cell] = []
        for group in groups or [list(range(learned))]:
            predict, numbers = _fitted(kind, [train[number] for number in group], settings)
            row += [accuracy(numbers[predict(test[number].features)], test[number].labels) for number in group]
        found[kind] = row + unseen
    return found


def _fitted(
    kind: str, train: Sequence[Labelled], settings: ProbeSettings
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """A probe over the classes that the rows have, and the numbers of these classes."""
    features = torch.cat([own.features for own in train])
    numbers, labels = torch.unique(torch.cat([own.labels for own in train]), return_inverse=True)
    return fit(kind, features, labels, len(numbers), settings), numbers


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of equal ones."""
    return 100.0 * float((predicted == labels).double().mean())


def _checked(reader: Features, task: Task) -> list[Row]:
    """A task's training rows, each answered by one label."""
    rows = task.train_rows()
    for row in rows:
        if len(row.turns) != 1 or row.turns[0][1] not in reader.classes:
            answer = row.turns[-1][1]
            raise UserError(f"{task.train}, id {row.id!r}: {answer!r} is no answer that is a label of the benchmark")
    return rows


def _gaps(file: Path, matrix: Sequence[Sequence[Cell]], order: Sequence[str]) -> Mapping[str, list[list[Cell]]]:
    """P - R for every scorer in percent of a results.json over the same tasks; none without one."""
    if not file.is_file():
        return {}
    results = read_json(file)
    if results.get("order") != list(order):
        return {}
    return {
        name: [
            [None if p is None or r is None else p - r for p, r in zip(probed, observed, strict=True)]
            for probed, observed in zip(matrix, scored["matrix"], strict=True)
        ]
        for name, scored in results["scorers"].items()
        if scored.get("range") == [0.0, 100.0]
    }
