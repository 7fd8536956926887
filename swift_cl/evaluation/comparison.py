"""Several runs side by side: grouped by method over seeds and task orders, refused where they do not compare."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError, did_you_mean
from swift_cl.evaluation.matrix_file import matrices
from swift_cl.evaluation.metrics import FORMULAS, compute
from swift_cl.evaluation.results import RESULTS_FILE, RESULTS_SCHEMA
from swift_cl.evaluation.routes import method_of
from swift_cl.evaluation.statistics import CONFIDENCE, Summary, larger_is_better, summarise, winner
from swift_cl.io import read_json


@dataclass(frozen=True)
class RunMetrics:
    """One run's metrics.

    Attributes:
        metrics: by scorer, then by metric; None where undefined or not measured.
        holes: (scorer, metric) pairs that are None because cells are missing.
    """

    path: Path
    benchmark: str
    model: str
    model_id: str | None
    method: str
    seed: int | None
    order: tuple[str, ...]
    expected: Mapping[str, int]
    higher_is_better: Mapping[str, bool]
    metrics: Mapping[str, Mapping[str, float | None]]
    holes: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Comparison:
    """Methods side by side under one scorer.

    Attributes:
        seeds, orders: by method, how many different ones its runs have.
        summaries: by method, then by metric.
        winners: by metric, the method that is significantly best, or None.
        missing: one line for each run and metric that a hole makes null, or that lacks the scorer.
    """

    scorer: str
    higher_is_better: bool
    seeds: Mapping[str, int]
    orders: Mapping[str, int]
    summaries: Mapping[str, Mapping[str, Summary]]
    winners: Mapping[str, str | None]
    missing: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """The object that `swift-cl compare --json` prints for a scorer."""
        methods = {
            method: {
                "n": next(iter(metrics.values())).n,
                "seeds": self.seeds[method],
                "orders": self.orders[method],
                "metrics": {name: asdict(summary) for name, summary in metrics.items()},
            }
            for method, metrics in self.summaries.items()
        }
        return {
            "higher_is_better": self.higher_is_better,
            "confidence": CONFIDENCE,
            "methods": methods,
            "winners": dict(self.winners),
            "missing": list(self.missing),
        }


def read_run(folder: Path) -> RunMetrics:
    """Metrics of a run folder (or its results.json), computed from its matrices.

    Raises:
        UserError: the file is missing or malformed, or holds several runs.
    """
    path = folder / RESULTS_FILE if folder.is_dir() else folder
    value = read_json(path)
    found = {entry.scorer or "": entry for entry in matrices(path, value)}
    if value.get("schema") != RESULTS_SCHEMA or "scorers" not in value:
        raise UserError(f"{path}: not a results.json of schema {RESULTS_SCHEMA}; make one with swift-cl eval")
    computed = {name: compute(entry.matrix, entry.higher_is_better) for name, entry in found.items()}
    order = tuple(value["order"])
    answers = value.get("answers")
    expected = answers.get("expected") if isinstance(answers, dict) else None
    return RunMetrics(
        path,
        str(value.get("benchmark")),
        str(value.get("model")),
        value.get("model_id"),
        method_of({"method": None, **value}),
        value.get("seed"),
        order,
        dict(zip(order, expected, strict=False)) if isinstance(expected, list) else {},
        {name: entry.higher_is_better for name, entry in found.items()},
        {name: metrics.values for name, metrics in computed.items()},
        frozenset((name, metric) for name, metrics in computed.items() for metric in metrics.missing),
    )


def check_comparable(runs: Sequence[RunMetrics]) -> None:
    """Refuse runs that do not compare: another benchmark, test set or base model, or one run twice.

    Base models are told apart by the hash of their content where both runs have it, else by their path.

    Raises:
        UserError: names the two runs and what differs.
    """
    first = runs[0]
    seen: dict[tuple[Any, ...], RunMetrics] = {}
    for run in runs:
        ids = (first.model_id, run.model_id)
        models = ids if None not in ids else (first.model, run.model)
        for what, (one, other) in {
            "benchmark": (first.benchmark, run.benchmark),
            "set of tasks": (", ".join(sorted(first.order)), ", ".join(sorted(run.order))),
            "base model": models,
            "number of test questions": (dict(first.expected), dict(run.expected)),
        }.items():
            if one != other and not (what == "number of test questions" and not (one and other)):
                shown = (first.model, run.model) if what == "base model" else (one, other)
                raise UserError(f"{first.path} and {run.path} differ in the {what}: {shown[0]} and {shown[1]}")
        key = (run.method, run.seed, run.order)
        if key in seen:
            raise UserError(
                f"{seen[key].path} and {run.path} are both {run.method}, seed {run.seed}, order "
                f"{', '.join(run.order)}; one run must not count twice"
            )
        seen[key] = run


def compare(runs: Sequence[RunMetrics], scorer: str | None = None) -> list[Comparison]:
    """One comparison for each scorer, or for the one that is asked for.

    Raises:
        UserError: the runs do not compare, or none of them has the scorer.
    """
    check_comparable(runs)
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if scorer is not None:
        if scorer not in names:
            raise UserError(f"--scorer: no run has {scorer!r}, found: {', '.join(names)}{did_you_mean(scorer, names)}")
        names = [scorer]
    return [_compare_one(runs, name) for name in names]


def _compare_one(runs: Sequence[RunMetrics], scorer: str) -> Comparison:
    directions = {run.higher_is_better[scorer] for run in runs if scorer in run.higher_is_better}
    if len(directions) > 1:
        raise UserError(f"scorer {scorer!r} is better high in some runs and better low in others; evaluate them anew")
    higher = directions.pop()
    groups: dict[str, list[RunMetrics]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    summaries = {
        method: {metric: summarise([run.metrics.get(scorer, {}).get(metric) for run in own]) for metric in FORMULAS}
        for method, own in groups.items()
    }
    winners = {
        metric: winner({method: found[metric] for method, found in summaries.items()}, larger_is_better(metric, higher))
        for metric in FORMULAS
    }
    missing = [f"{run.path}: no scores of {scorer}" for run in runs if scorer not in run.metrics]
    missing += [
        f"{run.path}: {scorer}, {metric} needs cells that were not measured"
        for run in runs
        for metric in FORMULAS
        if (scorer, metric) in run.holes
    ]
    return Comparison(
        scorer,
        higher,
        {method: len({run.seed for run in own}) for method, own in groups.items()},
        {method: len({run.order for run in own}) for method, own in groups.items()},
        summaries,
        winners,
        missing,
    )
