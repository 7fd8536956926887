"""report.html: one file that needs nothing else, neither a network nor the run's folder."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import swift_cl
from swift_cl.evaluation.comparison import Comparison
from swift_cl.evaluation.metrics import FORMULAS
from swift_cl.evaluation.statistics import CONFIDENCE
from swift_cl.report.charts import Chart
from swift_cl.report.comparison import Aggregate, aggregate, interval_text, mean_text
from swift_cl.report.curves import task_curves
from swift_cl.report.heatmap import Heatmap, heatmap
from swift_cl.report.overview import Fact, cut_answers, facts, methods, problems, sample_size, shared
from swift_cl.report.questions import question_data, script_json
from swift_cl.report.runs import ReportRun
from swift_cl.report.tables import (
    METRIC_NAMES,
    NOTES,
    REFERENCES,
    SUMMARY,
    direction,
    number,
    references,
    routing_tables,
    scale,
    scenario_tables,
    scorers,
)
from swift_cl.report.training import TrainingRecord, loss_curves, training_record


@dataclass(frozen=True)
class Metric:
    """A value of the metrics table; `note` says why there is none."""

    text: str
    note: str | None = None


@dataclass(frozen=True)
class OverRuns:
    """A method over its runs: their counts, and (mean ± spread, interval, whether it wins) for each of `SUMMARY`."""

    method: str
    counts: str
    cells: list[tuple[str, str, bool]]


@dataclass(frozen=True)
class Group:
    """Runs that learned the tasks in one order."""

    order: list[str]
    heatmaps: list[Heatmap]
    curves: list[Chart]


@dataclass(frozen=True)
class ScorerView:
    """Everything that is shown of one scorer.

    Attributes:
        metrics: (label of the run, a value for each metric of `SUMMARY`).
        range: lowest and highest value of the colours.
        references: names and meanings of the rows that the matrices are read against.
        csv: the metrics table.
        cell: how a cell comes from its answers, where results.json says so.
        facts: what the scorer recorded about how it scored, run by run where they differ.
        over_runs: a row for each method, where a method has several runs.
        refused: why runs of a method were not averaged.
    """

    name: str
    better: str
    metrics: list[tuple[str, list[Metric]]]
    groups: list[Group]
    range: tuple[float, float]
    references: list[tuple[str, str]]
    csv: str
    cell: str | None
    facts: list[tuple[str, str]]
    over_runs: list[OverRuns]
    refused: str | None


def render_html(runs: Sequence[ReportRun]) -> str:
    """The page. Needs Jinja2, which is imported here so that the command line starts fast."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("swift_cl.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = _data_url
    assert environment.loader is not None
    script, style = (environment.loader.get_source(environment, name)[0] for name in ("report.js", "report.css"))
    questions = question_data(runs)
    records = {run.label: training_record(run) for run in runs}
    styles = {run.label: index for index, run in enumerate(runs)}
    over = aggregate(runs)
    return environment.get_template("report.html.j2").render(
        page=_page(runs, records),
        runs=runs,
        methods=methods(runs),
        records=records,
        styles=styles,
        scorers=[_scorer_view(runs, name, styles, over) for name in scorers([run.results for run in runs])],
        losses=[chart for group in by_order(runs) for chart in loss_curves(group, records, styles)],
        confidence=f"{CONFIDENCE:.0%}",
        definitions=[(METRIC_NAMES[name], NOTES[name], FORMULAS[name]) for name in SUMMARY],
        routing=routing_tables([run.results for run in runs]),
        scenarios=scenario_tables([run.results for run in runs]),
        questions=questions,
        question_json=None if questions is None else Markup(script_json(questions)),
        version=swift_cl.__version__,
        style=Markup(style),
        script=Markup(script),
        # The page may run this script and nothing else, and may load nothing: not even by mistake.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src '{_hash(script)}'",
    )


@dataclass(frozen=True)
class Page:
    """Head of the page."""

    title: str
    facts: list[Fact]
    problems: list[str]
    cut: list[str]
    size: str
    notes: list[str]


def _page(runs: Sequence[ReportRun], records: dict[str, TrainingRecord]) -> Page:
    names = list(dict.fromkeys(str(run.results["benchmark"]) for run in runs))
    notes = [note for record in records.values() for note in record.notes]
    return Page(", ".join(names), facts(runs), problems(runs), cut_answers(runs), sample_size(runs), notes)


def by_order(runs: Sequence[ReportRun]) -> list[list[ReportRun]]:
    """The runs in groups that learned the same tasks in the same order."""
    groups: dict[tuple[str, ...], list[ReportRun]] = {}
    for run in runs:
        groups.setdefault(tuple(run.order), []).append(run)
    return list(groups.values())


def _scorer_view(runs: Sequence[ReportRun], name: str, styles: dict[str, int], over: Aggregate) -> ScorerView:
    scored = [run for run in runs if name in run.results["scorers"]]
    results = [run.results for run in scored]
    metrics = [(run.label, _metrics(run.results["scorers"][name]["metrics"])) for run in scored]
    lines = [["run", *SUMMARY]]
    for run in scored:
        values = run.results["scorers"][name]["metrics"]
        lines.append([run.label, *("" if values.get(key) is None else repr(float(values[key])) for key in SUMMARY)])
    return ScorerView(
        name,
        direction(results, name),
        metrics,
        [
            Group(group[0].order, [heatmap(scored, run, name) for run in group], task_curves(group, name, styles))
            for group in by_order(scored)
        ],
        scale(results, name),
        [(key, REFERENCES[key]) for key in references(results, name)],
        csv_text(lines),
        next((entry["scorers"][name]["cell"] for entry in results if entry["scorers"][name].get("cell")), None),
        shared(scored, lambda run: run.results["scorers"][name].get("facts", {})),
        _over_runs(over.of(name)),
        over.refused,
    )


def _over_runs(entry: Comparison | None) -> list[OverRuns]:
    if entry is None:
        return []
    found = []
    for method, metrics in entry.summaries.items():
        counts = f"runs: {metrics[SUMMARY[0]].n}, seeds: {entry.seeds[method]}, orders: {entry.orders[method]}"
        cells = [
            (mean_text(metrics[name]), interval_text(metrics[name]), entry.winners[name] == method) for name in SUMMARY
        ]
        found.append(OverRuns(method, counts, cells))
    return found


def _metrics(values: dict[str, Any]) -> list[Metric]:
    found = []
    for name in SUMMARY:
        note = None
        if values.get(name) is None:
            cells = values.get("missing_cells", {}).get(name, [])
            named = ", ".join("base" if stage == 0 else f"R[{stage},{task}]" for stage, task in cells)
            note = values.get("undefined", {}).get(name) or (
                f"needs {named}, not measured" if named else "not measured"
            )
        found.append(Metric("–" if note else number(values[name]), note))
    return found


def csv_text(lines: Sequence[Sequence[str]]) -> str:
    """Lines as CSV."""
    import csv
    import io

    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def _data_url(text: str) -> str:
    return "data:text/csv;charset=utf-8," + quote(text)


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
