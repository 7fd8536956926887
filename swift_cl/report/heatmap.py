"""The stage x task matrix of one run and one scorer, ready to be drawn as a table of coloured cells."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from swift_cl.report.runs import ReportRun, row_label
from swift_cl.report.tables import REFERENCES, direction, grid_rows, number, scale

DARK = 0.59
"""From this shade on, text on a cell has the other colour: contrast is at least 4.5 on both sides, in both themes."""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: the score, or a dash.
        shade: 0 (worst of the scale) to 1 (best); None where nothing was measured.
        title: what a pointer shows: row, column, score and n.
        n: number of scored answers, where results.json has it.
        note: 1-based number of the footnote that says why there is no score, or None.
        kind: `reference`, `own` (the task that the stage just learned), `seen` or `unseen`.
    """

    text: str
    shade: float | None
    title: str
    n: int | None
    note: int | None
    kind: str

    @property
    def dark(self) -> bool:
        """Whether the ground of the cell is far from that of the page."""
        return self.shade is not None and self.shade >= DARK


@dataclass(frozen=True)
class Heatmap:
    """A matrix as rows of cells.

    Attributes:
        run: label of the run.
        order: names of the columns.
        counts: the n that most cells of a column have; a cell with another one shows it itself.
        rows: (name, explanation, cells).
        notes: why cells are empty; cell notes count from 1.
        csv: the matrix in the form that `swift-cl metrics` reads.
    """

    run: str
    order: list[str]
    counts: list[int | None]
    rows: list[tuple[str, str, list[Cell]]]
    notes: list[str]
    csv: str


def matrix_csv(run: ReportRun, scorer: str) -> str:
    """Base row and stage rows with all digits; an empty cell was not measured. `swift-cl metrics` reads it."""
    scored = run.results["scorers"][scorer]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", *run.order])
    for index, row in enumerate([scored["base"], *scored["matrix"]]):
        if row is not None:
            writer.writerow([row_label(index, run.order), *("" if cell is None else repr(float(cell)) for cell in row)])
    return out.getvalue()


def comparison_csv(runs: Sequence[ReportRun], scorer: str) -> str:
    """One line a cell, for runs side by side: method, stage, model, task, n and score (empty: not measured)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "stage", "model", "task", "n", "score"])
    for run in runs:
        scored = run.results["scorers"].get(scorer)
        if scored is None:
            continue
        counts = _counts(scored, len(run.order))
        for index, row in enumerate([scored["base"], *scored["matrix"]]):
            for column, task in enumerate(run.order):
                cell = None if row is None else row[column]
                n = counts[index][column]
                score = "" if cell is None else repr(float(cell))
                writer.writerow([run.label, index, row_label(index, run.order), task, "" if n is None else n, score])
    return out.getvalue()


def _counts(scored: dict[str, list[list[int]]], size: int) -> list[list[int | None]]:
    """n of every cell, base row first; None where results.json has none."""
    unknown: list[list[int | None]] = [[None] * size]
    base = [scored["n_base"]] if scored.get("n_base") else unknown
    return [*base, *(scored["n"] if scored.get("n") else unknown * size)]


def missing_reason(run: ReportRun, scorer: str, row: int, column: int) -> str:
    """Why a cell is empty, in the words of results.json."""
    task = run.order[column]
    for problem in run.results.get("problems", []):
        cells = (
            f"{run.rows[row]} x {task}:",
            f"{scorer}, {run.rows[row]} x {task}:",
            f"stage {row} ({run.order[row - 1]}) ",
        )
        if str(problem).startswith(cells):
            return str(problem)
    return f"{run.rows[row]} x {task}: not measured"


def heatmap(runs: Sequence[ReportRun], run: ReportRun, scorer: str) -> Heatmap:
    """The matrix of a run on the colours that all `runs` share for this scorer."""
    results = [entry.results for entry in runs]
    scored = run.results["scorers"][scorer]
    low, high = scale(results, scorer)
    lower = direction(results, scorer) == "lower"
    counts = _counts(scored, len(run.order))
    notes: list[str] = []

    def cell(value: float | None, where: str, row: int | None, column: int) -> Cell:
        """`row` counts the base as 0; None for a reference row that was not asked but computed."""
        n = None if row is None else counts[row][column]
        kind = _kind(row, column)
        title = f"{where}, task {run.order[column]}: "
        if value is None:
            reason = "not measured" if row is None else missing_reason(run, scorer, row, column)
            if reason not in notes:
                notes.append(reason)
            return Cell("–", None, title + reason, n, notes.index(reason) + 1, kind)
        shade = (value - low) / (high - low)
        title += number(value) + (f" (n = {n})" if n is not None else "")
        return Cell(f"{value:.1f}", round(1 - shade if lower else shade, 3), title, n, None, kind)

    rows: list[tuple[str, str, list[Cell]]] = []
    stage = 0
    for key, name, values in grid_rows(scored, run.order):
        stage += key == "stage"
        at = {"base": 0, "stage": stage}.get(key)
        cells = [cell(value, name, at, column) for column, value in enumerate(values)]
        rows.append((name, REFERENCES.get(key, ""), cells))
    return Heatmap(run.label, run.order, _usual(counts), rows, notes, matrix_csv(run, scorer))


def _kind(row: int | None, column: int) -> str:
    if not row:
        return "reference"
    if column == row - 1:
        return "own"
    return "seen" if column < row - 1 else "unseen"


def _usual(counts: list[list[int | None]]) -> list[int | None]:
    """The most frequent n of each column."""
    return [Counter(column).most_common(1)[0][0] for column in zip(*counts, strict=True)]
