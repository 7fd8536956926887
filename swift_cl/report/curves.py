"""Scores over the stages, one chart a task, with a line a run."""

from collections.abc import Sequence

from swift_cl.report.charts import Chart, Line, chart
from swift_cl.report.runs import ReportRun, row_label
from swift_cl.report.tables import Results, grid_rows, number, scale

Cells = list[float | None]


def task_curves(runs: Sequence[ReportRun], scorer: str, styles: dict[str, int]) -> list[Chart]:
    """Charts for runs that share one order; the first is the mean over the tasks seen so far.

    The ground is shaded where the task had not been learned yet. A score that was not measured is a gap.

    Args:
        styles: number of each run's line style by its label.
    """
    order = runs[0].order
    scored = {run.label: run.results["scorers"][scorer] for run in runs}
    y_range = scale([run.results for run in runs], scorer)
    x_labels = ["base", *order]
    charts = []
    if len(order) > 1:
        lines = [
            _line(run, styles, [None, *_means(scored[run.label]["matrix"])], "mean of the tasks seen") for run in runs
        ]
        charts.append(chart("all tasks seen so far", lines, y_range, x_labels))
    for column, task in enumerate(order):
        lines = [_line(run, styles, _column(scored[run.label], order, column), f"task {task}") for run in runs]
        charts.append(
            chart(
                task,
                lines,
                y_range,
                x_labels,
                shaded_to=column + 1,
                levels=_levels(list(scored.values()), order, column),
            )
        )
    return charts


def _levels(scored: Sequence[Results], order: list[str], column: int) -> list[tuple[float, str]]:
    """Scores of a task that no stage changes, where the runs agree on them: the floor and joint training."""
    found: dict[str, set[float | None]] = {}
    for entry in scored:
        for row in grid_rows(entry, order):
            if row.key in ("floor", "joint"):
                found.setdefault(row.key, set()).add(row.cells[column])
    agreed = [(next(iter(values)), key) for key, values in found.items() if len(values) == 1]
    return [(value, key) for value, key in agreed if value is not None]


def _column(scored: Results, order: list[str], column: int) -> Cells:
    """A task's score by the base model and after each stage."""
    return [row.cells[column] for row in grid_rows(scored, order) if row.key in ("base", "stage")]


def _means(matrix: list[Cells]) -> Cells:
    """A_t of the incremental average: the mean over tasks 1..t after stage t, None where one of them is missing."""
    seen = [row[: stage + 1] for stage, row in enumerate(matrix)]
    return [None if None in cells else sum(c for c in cells if c is not None) / len(cells) for cells in seen]


def _line(run: ReportRun, styles: dict[str, int], values: Cells, what: str) -> Line:
    titles = [f"{run.label}, {row_label(x, run.order)}, {what}: {number(y)}" for x, y in enumerate(values)]
    return Line(run.label, styles[run.label], [(float(x), y) for x, y in enumerate(values)], titles)
