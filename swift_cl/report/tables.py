"""The tables of a report as plain data: cells are text already, so every renderer shows the same numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.evaluation.metrics import FORMULAS
from swift_cl.io import read_json

Results = dict[str, Any]
NOT_MEASURED = "-"
FLOOR = "floor"
"""Label of the row of shuffled references."""
METRIC_NAMES = {
    "avg_acc": "Avg.ACC",
    "forgetting": "Forgetting",
    "new_acc": "New.ACC",
    "bwt": "BWT",
    "fwt": "FWT",
    "last": "Last",
    "avg": "Avg",
}
SUMMARY = ("avg_acc", "forgetting", "new_acc", "bwt", "fwt", "avg")
NOTES = {
    "avg_acc": "mean of the last row",
    "forgetting": "how far old tasks fell from their best; positive = worse",
    "new_acc": "mean of the diagonal: each task right after it was learned",
    "bwt": "last row minus diagonal, old tasks; negative = forgetting",
    "fwt": "a task before it was learned minus the base model; positive = transfer",
    "avg": "incremental average: mean over stages of the tasks seen so far",
}


@dataclass(frozen=True)
class Table:
    """A titled table of text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()


def load_results(run_dir: Path) -> Results:
    """The results.json of a run folder (or the file itself)."""
    path = run_dir / "results.json" if run_dir.is_dir() else run_dir
    value = read_json(path)
    if not isinstance(value, dict) or value.get("schema") != 1 or "scorers" not in value:
        raise UserError(f"{path}: not a results.json of schema 1; make one with swift-cl eval")
    return value


def number(value: float | None) -> str:
    """A score with two digits after the point; `-` for one that was not measured."""
    return NOT_MEASURED if value is None else f"{value:.2f}"


def labels(results: Sequence[Results]) -> list[str]:
    """How the runs are called: by method, and by name too where two share a method."""
    methods = [str(entry["method"]) for entry in results]
    return [
        method if methods.count(method) == 1 else f"{method} ({entry.get('name', position)})"
        for position, (method, entry) in enumerate(zip(methods, results, strict=True), start=1)
    ]


def scorers(results: Sequence[Results]) -> list[str]:
    """Names of the scorers, in the order in which they appear."""
    return list(dict.fromkeys(name for entry in results for name in entry["scorers"]))


def grid_tables(results: Sequence[Results]) -> list[Table]:
    """For each scorer and order: the base row once a run, and one row a stage."""
    tables = []
    for scorer in scorers(results):
        for order in dict.fromkeys(tuple(entry["order"]) for entry in results):
            rows: list[list[str]] = []
            holes = False
            for label, entry in zip(labels(results), results, strict=True):
                if tuple(entry["order"]) != order or scorer not in entry["scorers"]:
                    continue
                scored = entry["scorers"][scorer]
                floor = scored.get("floor") or []
                if any(cell is not None for cell in floor):
                    rows.append([label, FLOOR, *(number(cell) for cell in floor)])
                lines = [("base", scored["base"]), *zip(order, scored["matrix"], strict=True)]
                for name, cells in lines:
                    holes |= cells is None or None in cells
                    row = [number(cell) for cell in cells] if cells else [NOT_MEASURED] * len(order)
                    rows.append([label, "base" if name == "base" else f"after {name}", *row])
            notes = [f"{NOT_MEASURED}: not measured, never counted as 0"] if holes else []
            if any(row[1] == FLOOR for row in rows):
                notes.append(f"{FLOOR}: what other questions' references score, fluent and wrong")
            title = f"{scorer}, {direction(results, scorer)} is better; rows: the model after a stage, columns: tasks"
            tables.append(Table(title, ["method", "model", *order], rows, tuple(notes)))
    return tables


def direction(results: Sequence[Results], scorer: str) -> str:
    """`higher` or `lower`."""
    found = [entry["scorers"][scorer] for entry in results if scorer in entry["scorers"]]
    return "higher" if all(entry.get("higher_is_better", True) for entry in found) else "lower"


def summary_tables(results: Sequence[Results]) -> list[Table]:
    """For each scorer: Avg.ACC, Forgetting, New.ACC and the rest of all runs side by side."""
    tables = []
    for scorer in scorers(results):
        better = direction(results, scorer)
        rows = []
        missing = False
        for label, entry in zip(labels(results), results, strict=True):
            metrics = entry["scorers"].get(scorer, {}).get("metrics", {})
            rows.append([label, *(number(metrics.get(name)) for name in SUMMARY)])
            missing |= any(metrics.get(name) is None for name in SUMMARY)
        notes = (f"{NOT_MEASURED}: undefined, or a cell that it needs was not measured",) if missing else ()
        header = ["method", *(METRIC_NAMES[name] for name in SUMMARY)]
        tables.append(Table(f"metrics of {scorer}, {better} is better", header, rows, notes))
    return tables


def legend_lines() -> list[str]:
    """Each metric in words."""
    return [f"{METRIC_NAMES[name]}: {NOTES[name]}" for name in SUMMARY]


def problem_lines(results: Sequence[Results]) -> list[str]:
    """Why cells are null, run by run."""
    return [
        f"{label}: {problem}"
        for label, entry in zip(labels(results), results, strict=True)
        for problem in entry.get("problems", [])
    ]


def facts(results: Sequence[Results]) -> Table:
    """What was run."""
    keys = ("benchmark", "model", "backend", "seed")
    rows = []
    for label, entry in zip(labels(results), results, strict=True):
        cut = entry.get("answers", {}).get("cut_at_max_tokens")
        rows.append([label, *(str(entry.get(key)) for key in keys), NOT_MEASURED if cut is None else str(cut)])
    return Table("runs", ["method", *keys, "answers cut at max_tokens"], rows)


def formula_lines() -> list[str]:
    """Each metric with its formula."""
    return [f"{METRIC_NAMES[name]} = {formula}" for name, formula in FORMULAS.items()]
