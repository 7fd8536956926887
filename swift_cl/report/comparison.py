"""Methods over several runs: mean, spread, interval and winner, for the terminal and the reports."""

from collections.abc import Sequence
from dataclasses import dataclass

from swift_cl.errors import UserError
from swift_cl.evaluation.comparison import Comparison, compare, read_run
from swift_cl.evaluation.statistics import CONFIDENCE, Summary
from swift_cl.report.overview import has_repeats
from swift_cl.report.runs import ReportRun
from swift_cl.report.tables import METRIC_NAMES, NOT_MEASURED, SUMMARY, Table, number
from swift_cl.report.text import table_text

WINNER = "*"


@dataclass(frozen=True)
class Aggregate:
    """The runs of a report, grouped by method.

    Attributes:
        comparisons: one a scorer; empty where no method has several runs.
        refused: why runs that could be grouped do not compare, None where they do.
    """

    comparisons: list[Comparison]
    refused: str | None = None

    def of(self, scorer: str) -> Comparison | None:
        """The comparison under a scorer."""
        return next((entry for entry in self.comparisons if entry.scorer == scorer), None)


def aggregate(runs: Sequence[ReportRun]) -> Aggregate:
    """Group the runs by method, if any method has several (seeds, task orders)."""
    if not has_repeats(runs):
        return Aggregate([])
    try:
        return Aggregate(compare([read_run(run.dir) for run in runs]))
    except UserError as error:
        return Aggregate([], str(error))


def comparison_table(entry: Comparison) -> Table:
    """One row for each metric and method: number of runs, mean ± standard deviation, interval, and who wins."""
    rows = []
    for metric in SUMMARY:
        for method, metrics in entry.summaries.items():
            found = metrics[metric]
            counts = [str(found.n), str(entry.seeds[method]), str(entry.orders[method])]
            mark = WINNER if entry.winners[metric] == method else ""
            rows.append([METRIC_NAMES[metric], method, *counts, mean_text(found), interval_text(found), mark])
    better = "higher" if entry.higher_is_better else "lower"
    notes = [
        f"interval: {CONFIDENCE:.0%} percentile bootstrap of the mean; few runs make it too narrow",
        f"{WINNER}: the interval overlaps no other method's",
    ]
    if any(metrics[name].mean is None for metrics in entry.summaries.values() for name in SUMMARY):
        notes.append(f"{NOT_MEASURED}: undefined, or missing in a run; never averaged over a hole")
    header = ["metric", "method", "n", "seeds", "orders", "mean ± std", "interval", "best"]
    return Table(f"{entry.scorer}, {better} is better", header, rows, tuple(notes))


def mean_text(summary: Summary) -> str:
    """`71.20 ± 1.10`; a single run has its value alone."""
    return number(summary.mean) + ("" if summary.std is None else f" ± {number(summary.std)}")


def interval_text(summary: Summary) -> str:
    """`[70.10, 72.30]`, empty where there is none."""
    return "" if summary.interval is None else f"[{number(summary.low)}, {number(summary.high)}]"


def comparison_text(entry: Comparison) -> str:
    """The table, and what is missing."""
    parts = [table_text(comparison_table(entry))]
    if entry.missing:
        parts.append("\n".join(["missing:", *(f"  {line}" for line in entry.missing)]))
    return "\n\n".join(parts)
