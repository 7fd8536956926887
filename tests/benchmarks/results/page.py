"""assets/RESULTS.md out of the files of assets/results: one JSON file a cell, nothing is computed twice."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from swift_cl.evaluation.statistics import Summary, summarise
from swift_cl.io import read_json, write_text
from swift_cl.methods.registry import methods
from tests.benchmarks.results.parts import PARTS, ROOT, Part, fits
from tests.benchmarks.results.settings import SETTINGS, SHARE, TUNERS

RESULTS, PAGE = ROOT / "assets" / "results", ROOT / "assets" / "RESULTS.md"
METRICS = ("avg_acc", "forgetting", "new_acc")
# What a method's paper claims of it, as a metric in which it is to be above `seq`; all others claim Avg.ACC.
CLAIMS = {"single": "new_acc"}

NOTES: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("notes.yaml").read_text())
"""By part and method: why a claim is not seen, or what it hangs on."""

WARM = (
    ", first tuned in full on lists of examples (`tests/benchmarks/results/warm_base.py`: other tasks, and questions "
    "of these with random answers), because without it that model cannot continue a list, which synthesis in context "
    "starts from"
)

HEAD = """# Results

Methods on small forms of five benchmarks (one of them with two base models), as far as measured yet, trained and
asked on two CPU cores by `tests/benchmarks/results_table.py`. Small models, few rows: what is compared are directions,
not the papers' numbers.

- **Learning rate**: for every method and benchmark the best of its tuner's grid ({grids}), by Avg.ACC on
  development rows after the first two tasks (seed 0; the protocol of Chaudhry et al. 2019; of the news none are held
  back, and Concept-1K is asked what was learned: there the training rows are asked). The baselines are
  tuned like the methods.
- **Then three seeds** (1, 2, 3) over the whole order, asked the test rows. Mean and, in brackets, the 95 % bootstrap
  interval, which is the range of three runs.
- **Rehearsal** is {share:.0%} of a task's rows for every method that rehearses; other settings that the defaults do not
  fit are in `tests/benchmarks/results/settings.py` (for {changed}).
- **time**: processor seconds of the three trainings, start of the command included, over those of `seq`; **memory**:
  peak resident memory over that of `seq`. Two or three cells were measured beside each other: `single`, which does
  the work of `seq`, took 1.10x on the news and 0.85x on Concept-1K, so that smaller differences say nothing. A dash: it
  was stopped and continued, and only the rest was timed.
- **claim**: whether the paper's claim, higher Avg.ACC than `seq` (`single`: higher New.ACC), is seen (✓), is
  contradicted (✗), or is undecided because the intervals overlap (open).
"""


def cells_of(part: str) -> dict[str, dict[str, Any]]:
    """The filled cells of a part by method."""
    return {path.stem: read_json(path) for path in sorted((RESULTS / part).glob("*.json"))}


def mean(summary: Summary) -> str:
    """`57.25 (55.00 to 60.00)`."""
    if summary.mean is None:
        return "-"
    return f"{summary.mean:.2f}" + (f" ({summary.low:.2f} to {summary.high:.2f})" if summary.interval else "")


def verdict(method: str, own: Mapping[str, Summary], seq: Mapping[str, Summary] | None) -> str:
    """Whether a method is above `seq` in what its paper claims; an overlap of the intervals decides nothing."""
    if method == "seq" or seq is None:
        return ""
    metric = CLAIMS.get(method, "avg_acc")
    mine, plain = own[metric].interval, seq[metric].interval
    if mine is None or plain is None:
        return ""
    return "✓" if mine[0] > plain[1] else "✗" if mine[1] < plain[0] else "open"


def ratio(cells: Mapping[str, Mapping[str, Any]], method: str, key: str) -> str:
    """A measure over that of `seq`; a dash where one of them is not known."""
    if "seq" not in cells:
        return ""
    own, plain = cells[method][key], cells["seq"][key]
    return "-" if own is None or plain is None else f"{own / plain:.2f}x"


def section(part: Part, cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of a part."""
    own = {name: {metric: summarise(cell["metrics"][metric]) for metric in METRICS} for name, cell in cells.items()}
    seq = own.get("seq")
    by_score: Callable[[str], float] = lambda name: -(own[name]["avg_acc"].mean or 0)  # noqa: E731
    lines = [
        "",
        f"## {part.title}",
        "",
        f"Base model `{part.model}`{WARM if part.lists else ''}; {part.rows} training and at most {part.test_rows} "
        f"test rows a task, {part.epochs} epochs, batch {part.batch}; scorer `{part.scorer}`.",
        "",
        "| method | lr | Avg.ACC | Forgetting | New.ACC | time | memory | claim |",
        "| --- " * 8 + "|",
    ]
    for name in sorted(cells, key=by_score):
        cell = cells[name]
        measured = [ratio(cells, name, key) for key in ("cpu_seconds", "memory_mb")]
        scores = [mean(own[name][metric]) for metric in METRICS]
        values = [f"`{name}`", f"{cell['learning_rate']:g}", *scores, *measured, verdict(name, own[name], seq)]
        lines.append("| " + " | ".join(values) + " |")
    notes = [f"- `{name}`: {text}" for name, text in NOTES.get(part.name, {}).items() if name in cells]
    lines += ["", *notes] if notes else []
    missing = [name for name in sorted(methods().keys() - cells.keys()) if fits(part, name)]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(f'`{name}`' for name in missing)}."]
    lines += ["", f"Each row: `python -m tests.benchmarks.results_table run --part {part.name} --methods NAME`."]
    return lines


def glance(filled: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Avg.ACC of every method on every part, and what the best reaches of joint training."""
    scores = {
        part: {name: {metric: summarise(cell["metrics"][metric]) for metric in METRICS} for name, cell in cells.items()}
        for part, cells in filled.items()
    }
    lines = ["", "## At a glance", "", "Mean Avg.ACC, and whether the claim is seen.", ""]
    lines += ["| method | " + " | ".join(f"`{part}`" for part in scores) + " |", "| --- " * (len(scores) + 1) + "|"]
    for method in sorted({name for own in scores.values() for name in own}):
        values = []
        for own in scores.values():
            mark = verdict(method, own[method], own.get("seq")) if method in own else ""
            values.append(f"{own[method]['avg_acc'].mean:.2f} {mark}".strip() if method in own else "")
        lines.append(f"| `{method}` | " + " | ".join(values) + " |")
    best = []
    for part, own in scores.items():
        ceiling = own["mtl"]["avg_acc"].mean if "mtl" in own else None
        others = {name: own[name]["avg_acc"].mean or 0 for name in own if name != "mtl"}
        if ceiling and others:
            name = max(others, key=lambda method: others[method])
            best.append(f"{others[name] / ceiling:.0%} on `{part}` (`{name}`)")
    return "\n".join([*lines, *(["", f"The best method reaches of `mtl`: {', '.join(best)}."] if best else [])]) + "\n"


def page_text() -> str:
    """The page from the filled cells."""
    grids = "; ".join(f"{name} {', '.join(f'{r:g}' for r in tuner.rates)}" for name, tuner in TUNERS.items())
    changed = ", ".join(f"`{name}`" for name in sorted(SETTINGS))
    text = HEAD.format(grids=grids, share=SHARE, changed=changed)
    filled = {name: cells for name in PARTS if (cells := cells_of(name))}
    text += glance(filled)
    text += "".join("\n".join(section(PARTS[name], cells)) + "\n" for name, cells in filled.items())
    empty = [part.title for name, part in PARTS.items() if name not in filled]
    if empty:
        text += "\n## Not measured yet\n\n" + "".join(f"- {title}\n" for title in empty)
    return text


def write_page() -> None:
    """Write the page."""
    write_text(PAGE, page_text())
