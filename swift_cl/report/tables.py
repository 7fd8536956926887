"""The tables of a report as plain data: cells are text already, so every renderer shows the same numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from swift_cl.evaluation.metrics import FORMULAS
from swift_cl.evaluation.routes import method_of

Results = dict[str, Any]
NOT_MEASURED = "-"
BASE_ROW = "base"
FLOOR = "floor"
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
REFERENCES = {
    FLOOR: "right answers to other questions (shuffled references): what a wrong answer scores",
    "base": "the model before the first task",
    "joint": "one training on all tasks together",
}
"""Rows that a matrix is read against."""


class GridRow(NamedTuple):
    """A row of a matrix: `key` is `stage` or one of `REFERENCES`; cells are None where nothing was measured."""

    key: str
    name: str
    cells: list[float | None]


@dataclass(frozen=True)
class Table:
    """A titled table of text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()


def number(value: float | None) -> str:
    """A score with two digits after the point; `-` for one that was not measured."""
    return NOT_MEASURED if value is None else f"{value:.2f}"


def labels(results: Sequence[Results]) -> list[str]:
    """How the runs are called: by method; runs that share one by their seeds, else names, else positions too.

    One that is told each question's task is called so: its numbers compare with no other's.
    """
    methods = [method_of(entry) for entry in results]
    found = []
    for position, (method, entry) in enumerate(zip(methods, results, strict=True), start=1):
        same = [other for other in results if method_of(other) == method]
        forms = [(entry.get(key), [other.get(key) for other in same]) for key in ("seed", "name")]
        told = [
            f"seed {value}" if key == "seed" else str(value)
            for key, (value, values) in zip(("seed", "name"), forms, strict=True)
            if value is not None and len(set(map(str, values))) == len(same)
        ]
        found.append(method if len(same) == 1 else f"{method} ({told[0] if told else position})")
    return found


def routing_tables(results: Sequence[Results]) -> list[Table]:
    """For each run that chooses an adapter for every question: how often it was one of the question's own task."""
    tables = []
    for label, entry in zip(labels(results), results, strict=True):
        routing = entry.get("routing")
        if routing is None:
            continue
        order = [str(task) for task in entry["order"]]
        rows = []
        for task, cells in zip(order, routing["accuracy"], strict=True):
            known = [cell for cell in cells if cell is not None]
            mean = sum(known) / len(known) if known else None
            rows.append([f"after {task}", *map(number, cells), number(mean)])
        notes = [
            f"{NOT_MEASURED}: the stage has no adapter of that task yet, or was not routed",
            "with two adapters or more, chance is 100 % divided by their number",
        ]
        if routing["task_id_given"]:
            notes = ["the task of every question was given, so nothing was chosen"]
        title = f"routing of {label}: % of questions that an adapter of their own task answered"
        tables.append(Table(title, ["model", *order, "mean"], rows, tuple(notes)))
    return tables


def scorers(results: Sequence[Results]) -> list[str]:
    """Names of the scorers, in the order in which they appear."""
    return list(dict.fromkeys(name for entry in results for name in entry["scorers"]))


def grid_tables(results: Sequence[Results]) -> list[Table]:
    """For each scorer and order: the rows to compare with (floor, base) once a run, and one row a stage."""
    tables = []
    for scorer in scorers(results):
        for order in dict.fromkeys(tuple(entry["order"]) for entry in results):
            rows: list[list[str]] = []
            holes = False
            for label, entry in zip(labels(results), results, strict=True):
                if tuple(entry["order"]) != order or scorer not in entry["scorers"]:
                    continue
                scored = entry["scorers"][scorer]
                for _, name, cells in grid_rows(scored, order):
                    holes |= None in cells
                    rows.append([label, name, *map(number, cells)])
            notes = [f"{NOT_MEASURED}: not measured, never counted as 0"] if holes else []
            notes += by_task_notes([entry["scorers"].get(scorer, {}) for entry in results])
            if any(row[1] == FLOOR for row in rows):
                notes.append(f"{FLOOR}: {REFERENCES[FLOOR]}")
            title = f"{scorer}, {direction(results, scorer)} is better; rows: the model after a stage, columns: tasks"
            tables.append(Table(title, ["method", "model", *order], rows, tuple(notes)))
    return tables


def by_task_notes(scored: Sequence[Results]) -> list[str]:
    """Which scorer each task has, where they differ: their units differ too, and so do those of a mean over tasks."""
    found = [
        ", ".join(f"{task}: {name}" for task, name in entry["by_task"].items())
        for entry in scored
        if "by_task" in entry
    ]
    return [f"each task by its own scorer ({text}); means over tasks mix them" for text in dict.fromkeys(found)]


def grid_rows(scored: Results, order: Sequence[str]) -> list[GridRow]:
    """Rows of a scorer's matrix: the floor (where results.json has one), the base model, the stages, and joint training
    (where it was run)."""
    empty: list[float | None] = [None] * len(order)
    rows = [GridRow("base", "base", scored["base"] or empty)]
    rows += [GridRow("stage", f"after {task}", cells) for task, cells in zip(order, scored["matrix"], strict=True)]
    floor, joint = scored.get("floor"), scored.get("ceiling", {}).get("mtl")
    if floor and floor != empty:
        rows.insert(0, GridRow(FLOOR, FLOOR, floor))
    if joint:
        rows.append(GridRow("joint", "joint", joint))
    return rows


def references(results: Sequence[Results], scorer: str | None = None) -> list[str]:
    """Keys of `REFERENCES` that the matrices have, of one scorer or of all."""
    found = {
        row.key
        for entry in results
        for name, scored in entry["scorers"].items()
        if scorer in (None, name)
        for row in grid_rows(scored, entry["order"])
    }
    return [key for key in REFERENCES if key in found]


def scale(results: Sequence[Results], scorer: str) -> tuple[float, float]:
    """Lowest and highest value of a scorer's axis and colours: 0 to 100, wider where a score lies outside; a scorer
    whose lower values are better ends at its highest score."""
    entries = [(entry["scorers"][scorer], entry["order"]) for entry in results if scorer in entry["scorers"]]
    rows = [row.cells for scored, order in entries for row in grid_rows(scored, order)]
    measured = [cell for row in rows for cell in row if cell is not None]
    low, high = min([0.0, *measured]), max([100.0 if direction(results, scorer) == "higher" else 0.0, *measured])
    return low, high if high > low else low + 1.0


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


SCENARIO_NOTES = {
    "edit_success": "questions of the edits as they were learned, last row",
    "generalisation": "the same in other words, last row",
    "locality": "questions that no edit is about, last row",
    "ma": "memorisation: incremental average over the learned questions",
    "ga": "generalisation: incremental average over the questions in other words",
    "mf": "forgetting of the learned questions; positive = worse",
    "gf": "forgetting of the questions in other words; positive = worse",
    "acc": "after the last task, mean over tasks",
    "acc_rows": "after the last task, over all rows: large tasks count more",
    "inc_acc": "incremental average: mean over stages of the mean over the tasks seen so far",
    "inc_acc_rows": "the same over the rows seen so far",
    "forgetting": "how far old tasks fell from their best; positive = worse",
}


def scenario_tables(results: Sequence[Results]) -> list[Table]:
    """For each scorer the metrics of the benchmark's scenario, and the probes before and after."""
    tables = []
    named = list(zip(labels(results), results, strict=True))
    for scorer in scorers(results):
        own = [(label, entry["scenario"][scorer]) for label, entry in named if scorer in entry.get("scenario", {})]
        if own:
            names = list(own[0][1])
            rows = [[label, *(number(metrics.get(name)) for name in names)] for label, metrics in own]
            notes = tuple(f"{name}: {SCENARIO_NOTES[name]}" for name in names)
            tables.append(Table(f"scenario metrics, {scorer}", ["method", *names], rows, notes))
        tables += _seen_tables(named, scorer)
        probed = [
            (label, entry["probes"]) for label, entry in named if scorer in entry.get("probes", {}).get("scorers", {})
        ]
        if probed:
            tasks = probed[0][1]["tasks"]
            rows = []
            for label, probes in probed:
                rows += _before_and_after(label, probes["scorers"][scorer])
            note = "change: last minus base, negative = worse; delta_g: its mean over the probes"
            title = f"probes (asked, never learned), {scorer}"
            tables.append(Table(title, ["method", "model", *tasks, "delta_g"], rows, (note,)))
    return tables + harness_tables(named)


def harness_tables(named: Sequence[tuple[str, Results]]) -> list[Table]:
    """What lm-evaluation-harness found, a table a metric, in its own units."""
    tables = []
    asked = [(label, entry["harness"]["metrics"]) for label, entry in named if "harness" in entry]
    for metric in dict.fromkeys(metric for _, metrics in asked for metric in metrics):
        own = [(label, metrics[metric]) for label, metrics in asked if metric in metrics]
        tasks = own[0][1]["tasks"]
        rows = [line for label, found in own if found["tasks"] == tasks for line in _before_and_after(label, found)]
        notes = ("the harness's own units; change: last minus base, negative = worse; delta_g: its mean",)
        title = f"general ability (lm-evaluation-harness), {metric}"
        tables.append(Table(title, ["method", "model", *tasks, "delta_g"], rows, notes))
    return tables


def _before_and_after(label: str, found: dict[str, Any]) -> list[list[str]]:
    """Three rows: the base model, the last stage, and the change with its mean."""
    return [
        [label, BASE_ROW, *map(number, found["base"]), ""],
        [label, "last", *map(number, found["rows"][-1]), ""],
        [label, "change", *map(number, found["change"]), number(found["delta_g"])],
    ]


def _seen_tables(named: Sequence[tuple[str, Results]], scorer: str) -> list[Table]:
    """Accuracy over the tasks seen so far, stage by stage, where the benchmark classifies."""
    own = [
        (label, entry["scorers"][scorer]["seen"], entry)
        for label, entry in named
        if scorer in entry["scorers"] and "seen" in entry["scorers"][scorer]
    ]
    if not own:
        return []
    stages = [f"stage {number}" for number in range(1, len(own[0][2]["order"]) + 1)]
    rows = [[label, over, *map(number, seen[over])] for label, seen, _ in own for over in ("tasks", "rows")]
    note = "accuracy over the tasks seen so far: the mean over tasks, and that over all their rows"
    return [Table(f"seen so far, {scorer}", ["method", "mean over", *stages], rows, (note,))]


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


def formula_lines() -> list[str]:
    """Each metric with its formula."""
    return [f"{METRIC_NAMES[name]} = {formula}" for name, formula in FORMULAS.items()]
