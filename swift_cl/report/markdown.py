"""report.md: the essentials as text."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from swift_cl.report.comparison import aggregate, comparison_table
from swift_cl.report.overview import cut_answers, facts, methods, problems, sample_size
from swift_cl.report.runs import ReportRun
from swift_cl.report.tables import (
    REFERENCES,
    Table,
    formula_lines,
    grid_tables,
    legend_lines,
    references,
    routing_tables,
    scenario_tables,
    summary_tables,
)
from swift_cl.report.training import TrainingRecord, training_record


def render_markdown(runs: Sequence[ReportRun], plots: Mapping[str, str]) -> str:
    """The report as Markdown.

    Args:
        plots: file of each scorer's heat map, beside the report.
    """
    results = [run.results for run in runs]
    records = [training_record(run) for run in runs]
    title = ", ".join(dict.fromkeys(str(entry["benchmark"]) for entry in results))
    parts = [f"# {title}: {methods(runs)}"]
    parts.append("\n".join(f"- {fact.name}: {fact.full or fact.value}" for fact in facts(runs)))
    missing = problems(runs)
    if missing:
        parts.append("## Not measured\n\n" + "\n".join(f"- {line}" for line in missing))
    lines = [*cut_answers(runs), *(note for record in records for note in record.notes)]
    if lines:
        parts.append("## Problems\n\n" + "\n".join(f"- {line}" for line in lines))
    parts.append(sample_size(runs))
    parts += [_table(table) for table in (*summary_tables(results), *scenario_tables(results))]
    over = aggregate(runs)
    parts += [_over_runs(comparison_table(entry)) for entry in over.comparisons]
    if over.refused:
        parts.append(f"Not averaged over runs: {over.refused}")
    parts += [_table(table) for table in grid_tables(results)]
    parts += [_table(table) for table in routing_tables(results)]
    shown = references(results)
    if len(shown) > 1:
        parts.append("\n".join(f"- {name}: {REFERENCES[name]}" for name in shown))
    parts.append(
        "## Matrix\n\n" + "\n\n".join(f"![stage x task matrix, {name}]({file})" for name, file in plots.items())
    )
    parts.append("## Metrics\n\n" + "\n".join(f"- {line}" for line in (*legend_lines(), *formula_lines())))
    parts += [_training(run, record) for run, record in zip(runs, records, strict=True) if record.stages]
    return "\n\n".join(parts) + "\n"


def _table(table: Table, level: int = 2) -> str:
    align = ["---" if index == 0 or name == "model" else "---:" for index, name in enumerate(table.header)]
    lines = [table.header, align, *table.rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"{'#' * level} {table.title}\n\n{text}" + (f"\n\n{notes}" if notes else "")


def _over_runs(table: Table) -> str:
    return _table(replace(table, title=f"Over seeds and orders: {table.title}"))


def _training(run: ReportRun, record: TrainingRecord) -> str:
    header = ["stage", "rows", "epochs", "steps", "last loss", "seconds", "processes", "FLOPs", "weights (sha256)"]
    rows = [[*line[:8], line[8][:12]] for line in record.table]
    known = [*record.versions.items(), *record.cost, *record.asked.items()]
    parts = [_table(Table(f"Training of {run.label}", header, rows))]
    if known:
        parts.append("\n".join(f"- {name}: {value}" for name, value in known))
    if record.commands or record.eval_commands:
        parts.append("```sh\n" + "\n".join([*record.commands, *record.eval_commands]) + "\n```")
    return "\n\n".join(parts)
