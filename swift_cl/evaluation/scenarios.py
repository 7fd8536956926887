"""Metrics of scenarios: what the matrices of a benchmark's views are called, accuracy over growing label spaces, and
the change of general ability.

A view asks other questions about the same tasks and has a matrix of its own. The questions of the tasks themselves are
those of the benchmark; sources: the papers' text as in the formulas of `swift_cl.evaluation.metrics`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from swift_cl.evaluation.metrics import Cell
from swift_cl.stream.benchmark_file import CLASSIFICATION

MAIN = ""
"""Stands for the questions of the tasks themselves."""
SCENARIOS: dict[str, dict[str, tuple[str, str]]] = {
    # Asked by a rephrased question; the view `edit` asks the question that was learned, `locality` unrelated ones.
    "knowledge_editing": {
        "edit_success": ("edit", "avg_acc"),
        "generalisation": (MAIN, "avg_acc"),
        "locality": ("locality", "avg_acc"),
    },
    # Concept-1K: the view `memorisation` asks what was learned, the tasks themselves in other words.
    "instance_incremental": {
        "ma": ("memorisation", "avg"),
        "ga": (MAIN, "avg"),
        "mf": ("memorisation", "forgetting"),
        "gf": (MAIN, "forgetting"),
    },
    # The same of both scenarios of classification; `acc_rows` and `inc_acc_rows` come from `seen_accuracy`.
    **{
        name: {"acc": (MAIN, "avg_acc"), "inc_acc": (MAIN, "avg"), "forgetting": (MAIN, "forgetting")}
        for name in CLASSIFICATION
    },
}
"""By scenario and metric: the view, and which of its metrics."""


def scenario_metrics(
    scenario: str, main: Mapping[str, Any], views: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Cell]]:
    """The metrics of a scenario by scorer; None where the metric that it is called after is None.

    Args:
        main: the scorers' parts of results.json.
        views: the same of each view.
    """
    found: dict[str, dict[str, Cell]] = {
        scorer: {
            name: (main if view == MAIN else views[view])[scorer]["metrics"][metric]
            for name, (view, metric) in SCENARIOS[scenario].items()
        }
        for scorer in main
    }
    if scenario in CLASSIFICATION:
        for scorer, values in found.items():
            by_rows = main[scorer]["seen"]["rows"]
            values |= {"acc_rows": by_rows[-1], "inc_acc_rows": _mean(by_rows)}
    return found


def visible_labels(scenario: str | None, labels: Sequence[Sequence[str]], stage: int, task: int) -> tuple[str, ...]:
    """The labels that an answer may be.

    class_incremental: those of all tasks up to the stage; a question of a later task is asked with the label space that
    it will have when its task is learned, so that it has a right answer. task_incremental: those of its own task.

    Args:
        labels: those of each task, in the order of learning; empty outside the scenarios of classification.
        stage: how many tasks were learned, 0 for the base model.
        task: position of the question's task, from 0.
    """
    if not labels:
        return ()
    if scenario == "task_incremental":
        return tuple(labels[task])
    return tuple(dict.fromkeys(label for own in labels[: max(stage, task + 1)] for label in own))


def seen_accuracy(
    matrix: Sequence[Sequence[Cell]], counts: Sequence[Sequence[int]], by_rows: bool = True
) -> dict[str, list[Cell]]:
    """After each stage the accuracy over the tasks seen so far, twice: `tasks`, the mean over tasks, and `rows`, that
    over all their rows (100 rows at 50 and 300 at 90: 70 and 80).

    Args:
        matrix: percent, a row a stage, a column a task.
        counts: how many rows each cell is the mean of.
        by_rows: whether a cell is a mean; `rows` is None otherwise (the corpus BLEU of all rows is no mean of cells).

    Returns:
        one number a stage; None where one of its cells was not measured.
    """
    found: dict[str, list[Cell]] = {"tasks": [], "rows": []}
    for stage, (row, sizes) in enumerate(zip(matrix, counts, strict=True), start=1):
        seen = [cell for cell in row[:stage] if cell is not None]
        whole = len(seen) == stage
        found["tasks"].append(_mean(seen) if whole else None)
        total = math.fsum(cell * size for cell, size in zip(seen, sizes, strict=False))
        found["rows"].append(total / sum(sizes[:stage]) if whole and by_rows else None)
    return found


def _mean(cells: Sequence[Cell]) -> Cell:
    """The mean; None where one is not known."""
    numbers = [cell for cell in cells if cell is not None]
    return math.fsum(numbers) / len(numbers) if len(numbers) == len(cells) else None


def general_ability(base: Sequence[Cell], last: Sequence[Cell], higher_is_better: bool) -> dict[str, Any]:
    """How each probe changed from the base model to the last stage (negative = worse), and the mean over the probes.

    TRACE's Delta R^G = mean of (R_T - R_0). None where a probe was not measured before or after.
    """
    sign = 1.0 if higher_is_better else -1.0
    change = [
        None if before is None or after is None else sign * (after - before)
        for before, after in zip(base, last, strict=True)
    ]
    return {"change": change, "delta_g": _mean(change)}
