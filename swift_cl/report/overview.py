"""What a report says first: what was run, on how many questions, and what is missing."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from swift_cl.evaluation.routes import method_of
from swift_cl.report.runs import ReportRun


@dataclass(frozen=True)
class Fact:
    """A name and its value; `full` is the longer form, where there is one."""

    name: str
    value: str
    full: str | None = None


def _each(runs: Sequence[ReportRun], get: Callable[[ReportRun], Any]) -> str:
    """The value that all runs share, or each run's."""
    values = [str(get(run)) for run in runs]
    if len(set(values)) == 1:
        return values[0]
    return "; ".join(f"{run.label}: {value}" for run, value in zip(runs, values, strict=True))


def facts(runs: Sequence[ReportRun]) -> list[Fact]:
    """What was run; a value that the runs do not share is given for each."""
    model = _each(runs, lambda run: run.results["model"])
    short = _each(runs, lambda run: PurePath(str(run.results["model"])).name)
    found = [
        Fact("Order of tasks", _each(runs, lambda run: " → ".join(run.order))),
        Fact("Model", short, model if model != short else None),
        Fact("Methods" if len(runs) > 1 else "Method", methods(runs)),
        seeds(runs),
        Fact("Backend of the answers", _each(runs, lambda run: run.results.get("backend"))),
    ]
    expected = [run.results.get("answers", {}).get("expected") for run in runs]
    if None not in expected:
        asked = [_counts(counts) for counts in expected]
        value = asked[0] if len(set(asked)) == 1 else _each(runs, lambda run: asked[list(runs).index(run)])
        found.append(Fact("Questions a task", value))
    return found


def methods(runs: Sequence[ReportRun]) -> str:
    """`seq, replay`; with several runs of a method `seq (3 runs), replay (3 runs)`."""
    counts = Counter(method_of(run.results) for run in runs)
    return ", ".join(name if count == 1 else f"{name} ({count} runs)" for name, count in counts.items())


def has_repeats(runs: Sequence[ReportRun]) -> bool:
    """Whether a method has several runs."""
    return len({method_of(run.results) for run in runs}) < len(runs)


def seeds(runs: Sequence[ReportRun]) -> Fact:
    """Each seed once; the labels of the runs say which run has which, where a method has several."""
    found = list(dict.fromkeys(str(run.results.get("seed")) for run in runs))
    if len(found) > 1 and not has_repeats(runs):
        return Fact("Seed", _each(runs, lambda run: run.results.get("seed")))
    return Fact("Seeds" if len(found) > 1 else "Seed", ", ".join(found))


def shared(runs: Sequence[ReportRun], get: Callable[[ReportRun], Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Names and values of what each run recorded; a value that the runs do not share is given for each."""
    names = dict.fromkeys(name for run in runs for name in get(run))
    return [(name, _each(runs, partial(_named, get, name))) for name in names]


def _named(get: Callable[[ReportRun], Mapping[str, Any]], name: str, run: ReportRun) -> str:
    return as_text(get(run).get(name))


def as_text(value: Any) -> str:
    """A value of a JSON file for people."""
    if value is None:
        return "-"
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _counts(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else ", ".join(str(count) for count in counts)


def problems(runs: Sequence[ReportRun]) -> list[str]:
    """Why cells are null, run by run."""
    named = len(runs) > 1
    return [f"{run.label}: {line}" if named else str(line) for run in runs for line in run.results.get("problems", [])]


def cut_answers(runs: Sequence[ReportRun]) -> list[str]:
    """A line for each run with answers that ended at the token limit."""
    found = []
    for run in runs:
        answers = run.results.get("answers", {})
        if answers.get("cut_at_max_tokens"):
            total = sum(answers["expected"]) * len(run.rows)
            found.append(f"{run.label}: {answers['cut_at_max_tokens']} of {total} answers were cut at the token limit")
    return found


def sample_size(runs: Sequence[ReportRun]) -> str:
    """How much the numbers rest on, in one sentence."""
    counts = sorted(
        {
            n
            for run in runs
            for scored in run.results["scorers"].values()
            for counts, cells in zip(
                [scored.get("n_base") or (), *(scored.get("n") or ())],
                [scored["base"] or (), *scored["matrix"]],
                strict=False,
            )
            for n, cell in zip(counts, cells, strict=False)
            if cell is not None
        }
    )
    if not counts:
        return "The number of answers behind each cell was not recorded."
    size = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if has_repeats(runs):
        return (
            f"Each cell rests on n = {size} answers of one run. Differences between single runs may be chance; best "
            "values are marked only among the means over seeds and orders, where intervals do not overlap."
        )
    between = " between the methods" if len(runs) > 1 else ""
    return (
        f"Each cell rests on n = {size} answers of one run with one seed. Small differences{between} may be "
        "chance, so no best value is marked."
    )
