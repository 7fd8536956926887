"""report.md, report.html and matrix.png, rebuilt from results.json at any time."""

import base64
import os
from collections.abc import Sequence
from pathlib import Path

from swift_cl.io import write_json, write_text
from swift_cl.report.plot import write_heatmap
from swift_cl.report.tables import (
    Results,
    Table,
    facts,
    formula_lines,
    grid_tables,
    legend_lines,
    load_results,
    problem_lines,
    summary_tables,
)


def write_reports(run_dirs: Sequence[Path], output: Path | None = None) -> tuple[list[Results], Path]:
    """Write each run's report into its folder; several runs are also compared in `output`.

    Args:
        run_dirs: folders with a results.json.
        output: where the comparison goes; default: the runs' common parent. For one run its report goes there instead.

    Returns:
        the results, and the folder of the report that covers them all.
    """
    results = [load_results(run_dir) for run_dir in run_dirs]
    for run_dir, entry in zip(run_dirs, results, strict=True):
        write_report(run_dir if run_dir.is_dir() else run_dir.parent, [entry])
    if len(results) == 1 and output is None:
        return results, run_dirs[0] if run_dirs[0].is_dir() else run_dirs[0].parent
    folder = output or Path(os.path.commonpath([run_dir.resolve().parent for run_dir in run_dirs]))
    write_report(folder, results)
    write_json(folder / "results.json", results[0] if len(results) == 1 else {"schema": 1, "runs": results})
    return results, folder


def write_report(folder: Path, results: Sequence[Results]) -> None:
    """Write report.md, report.html (with the plot inside) and matrix.png into `folder`."""
    import jinja2

    image = folder / "matrix.png"
    write_heatmap(image, results)
    tables = [*summary_tables(results), *grid_tables(results), facts(results)]
    title = f"{results[0]['benchmark']}: {', '.join(dict.fromkeys(str(entry['method']) for entry in results))}"
    problems = problem_lines(results)
    write_text(folder / "report.md", _markdown(title, tables, problems, image.name))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("swift_cl.report"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    html = environment.get_template("report.html.j2").render(
        title=title,
        tables=tables,
        problems=problems,
        formulas=[*legend_lines(), *formula_lines()],
        image=f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}",
    )
    write_text(folder / "report.html", html)


def _markdown(title: str, tables: Sequence[Table], problems: Sequence[str], image: str) -> str:
    parts = [f"# {title}"]
    for table in tables:
        parts.append(f"## {table.title}")
        align = ["---" if index == 0 or name == "model" else "---:" for index, name in enumerate(table.header)]
        lines = [table.header, align, *table.rows]
        parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines))
        if table.notes:
            parts.append("\n".join(f"- {note}" for note in table.notes))
    if problems:
        parts.append("## Not measured\n\n" + "\n".join(f"- {line}" for line in problems))
    parts.append(f"## Matrix\n\n![stage x task matrix]({image})")
    parts.append("## Metrics\n\n" + "\n".join(f"- {line}" for line in (*legend_lines(), *formula_lines())))
    return "\n\n".join(parts) + "\n"
