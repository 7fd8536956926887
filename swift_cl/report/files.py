"""All files of a report, rebuilt at any time from what is on disk: Markdown, HTML, a CSV and a plot a scorer."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from swift_cl.evaluation.results import RESULTS_FILE
from swift_cl.io import write_json, write_text
from swift_cl.report.heatmap import comparison_csv, matrix_csv
from swift_cl.report.html import render_html
from swift_cl.report.markdown import render_markdown
from swift_cl.report.plot import write_heatmap
from swift_cl.report.runs import ReportRun, load_runs
from swift_cl.report.tables import Results, scorers


def write_reports(run_dirs: Sequence[Path], output: Path | None = None) -> tuple[list[Results], Path]:
    """Write each run's report into its folder; several runs are also compared in `output`.

    Args:
        run_dirs: folders with a results.json.
        output: where the comparison goes; default: the runs' common parent. For one run its report goes there instead.

    Returns:
        the results, and the folder of the report that covers them all.
    """
    runs = load_runs(run_dirs)
    results = [run.results for run in runs]
    for run in runs:
        # Alone, a run needs no more than its method as a label.
        write_report(run.dir, load_runs([run.dir / RESULTS_FILE]))
    if len(runs) == 1 and output is None:
        return results, runs[0].dir
    folder = output or Path(os.path.commonpath([run.dir.resolve().parent for run in runs]))
    write_report(folder, runs)
    write_json(folder / RESULTS_FILE, results[0] if len(results) == 1 else {"schema": 1, "runs": results})
    return results, folder


def write_report(folder: Path, runs: Sequence[ReportRun]) -> None:
    """Write report.md, report.html, matrix.png (the first scorer), and a CSV and a plot for each scorer."""
    results = [run.results for run in runs]
    plots = {}
    for number, scorer in enumerate(scorers(results)):
        plots[scorer] = f"matrix-{file_name(scorer)}.png"
        write_heatmap(folder / plots[scorer], results, scorer)
        if number == 0:
            write_heatmap(folder / "matrix.png", results, scorer)
        table = matrix_csv(runs[0], scorer) if len(runs) == 1 else comparison_csv(runs, scorer)
        write_text(folder / f"matrix-{file_name(scorer)}.csv", table)
    write_text(folder / "report.md", render_markdown(runs, plots))
    write_text(folder / "report.html", render_html(runs))


def file_name(name: str) -> str:
    """A scorer's name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name)
