"""Tables for the terminal."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swift_cl.evaluation.metrics import FORMULAS, Metrics
from swift_cl.report.tables import (
    METRIC_NAMES,
    Results,
    Table,
    grid_tables,
    legend_lines,
    number,
    problem_lines,
    routing_tables,
    scenario_tables,
    summary_tables,
)

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 160
"""Characters; wide enough that no column of numbers is folded."""


def _console() -> "tuple[Console, io.StringIO]":
    from rich.console import Console

    out = io.StringIO()
    return Console(file=out, width=WIDTH, color_system=None, highlight=False, markup=False), out


def table_text(table: Table) -> str:
    """A table with its title and notes; a line separates the methods."""
    import rich.box
    import rich.table

    console, out = _console()
    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(table.header):
        text = position == 0 or column == "model"
        drawn.add_column(column, justify="left" if text else "right", no_wrap=True)
    for row, following in zip(table.rows, [*table.rows[1:], None], strict=True):
        drawn.add_row(*row, end_section=following is not None and len(table.rows) > 3 and following[0] != row[0])
    console.print(table.title)
    console.print(drawn)
    for note in table.notes:
        console.print(note)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def render_text(results: Sequence[Results]) -> str:
    """All runs in one text: the base row and the stage rows of every method, then the metrics side by side."""
    tables = [*grid_tables(results), *routing_tables(results), *summary_tables(results), *scenario_tables(results)]
    parts = [table_text(table) for table in tables]
    parts.append("\n".join(legend_lines()))
    problems = problem_lines(results)
    if problems:
        parts.append("\n".join(["not measured:", *(f"  {line}" for line in problems)]))
    return "\n\n".join(parts)


def metrics_text(scorer: str | None, metrics: Metrics) -> str:
    """Each metric on a line with its formula, or with the reason why it has no value."""
    lines = [f"{scorer}:"] if scorer else []
    for name, formula in FORMULAS.items():
        value = metrics.values[name]
        why = formula
        if name in metrics.reasons:
            why = metrics.reasons[name]
        elif name in metrics.missing:
            cells = ", ".join("base" if s == 0 else f"[{s},{t}]" for s, t in metrics.missing[name])
            why = f"needs cells that were not measured: {cells}"
        lines.append(f"{METRIC_NAMES[name]:<11}{number(value):>9}   {why}")
    return "\n".join(lines)
