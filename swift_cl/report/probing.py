"""The tables of probing.json for the terminal."""

from collections.abc import Mapping
from typing import Any

from swift_cl.report.tables import BASE_ROW, Table, number
from swift_cl.report.text import table_text

NOTES = {
    "seen": "percent of a task's test rows that fresh probes get right, trained on the tasks learned so far",
    "all": "percent of a task's test rows that fresh probes get right, trained on all tasks: it sees future data",
}
GAP = "gap to {}: probe minus observed, in points; what is not lost in the features"


def probing_text(found: Mapping[str, Any]) -> str:
    """A table of P, and one of P - R for each scorer."""
    order: list[str] = found["order"]
    rows: list[list[str]] = []
    for kind, values in found["kinds"].items():
        if "base" in values:
            rows.append([kind, BASE_ROW, *map(number, values["base"]), "", ""])
        for task, row, tasks, mean in zip(
            order, values["matrix"], values["seen"]["tasks"], values["seen"]["rows"], strict=True
        ):
            rows.append([kind, f"after {task}", *map(number, row), number(tasks), number(mean)])
    header = ["probe", "model", *order, "seen (tasks)", "seen (rows)"]
    title = f"probing performance, {found['method']}, {found['scenario']}"
    parts = [table_text(Table(title, header, rows, (NOTES[found["scope"]],)))]
    scorers = {name for values in found["kinds"].values() for name in values["gap"]}
    for scorer in sorted(scorers):
        gaps = [
            [kind, f"after {task}", *map(number, row)]
            for kind, values in found["kinds"].items()
            for task, row in zip(order, values["gap"][scorer], strict=True)
        ]
        parts.append(table_text(Table(GAP.format(scorer), ["probe", "model", *order], gaps)))
    return "\n\n".join(parts)
