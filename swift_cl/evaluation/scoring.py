"""The scorers of a grid, each with its settings for every task, and what one scorer makes of the grid's answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift_cl.errors import UserError
from swift_cl.evaluation.plan import Grid
from swift_cl.evaluation.scorers import Item, LoadedScorer, Score, Unscored, load, module
from swift_cl.evaluation.scorers._options import parse
from swift_cl.io import sha256_json
from swift_cl.stream.benchmark import Benchmark, ScorerOptions, Task

MEAN = "mean of the answers' scores"
PER_TASK = "per_task"
"""Stands where a scorer stands: each task by its own one. For benchmarks whose tasks have different scorers."""


@dataclass(frozen=True)
class GridScorer:
    """A scorer for all tasks of a grid, or (`PER_TASK`) one for each.

    Attributes:
        by_task: the scorer with each task's settings; tasks with equal settings share one.
    """

    name: str
    higher_is_better: bool
    by_task: Mapping[str, LoadedScorer]

    @property
    def has_floor(self) -> bool:
        """Whether shuffled references tell its floor."""
        return all(scorer.has_floor for scorer in self.by_task.values())

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest score of any task."""
        ranges = [scorer.range for scorer in self.by_task.values()]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    @property
    def cell(self) -> str:
        """How a cell comes from its answers."""
        said = {scorer.name: getattr(module(scorer.name), "CELL", MEAN) for scorer in self.by_task.values()}
        if len(set(said.values())) == 1:
            return next(iter(said.values()))
        return "; ".join(f"{name}: {text}" for name, text in said.items())

    @property
    def names(self) -> dict[str, str]:
        """The scorer of each task."""
        return {task: scorer.name for task, scorer in self.by_task.items()}


@dataclass(frozen=True)
class ScoredCell:
    """What a scorer made of one cell.

    Attributes:
        value: the cell; None without answers, or where one of them has no score.
        scores: of each answer, in the order of the items.
        problems: why answers have no score, each reason with its count, the most frequent first.
    """

    value: float | None
    scores: list[Score]
    problems: list[str] = field(default_factory=list)

    @property
    def unscored(self) -> int:
        """How many answers have no score."""
        return sum(isinstance(score, Unscored) for score in self.scores)


def choose_scorers(grids: Sequence[Grid], asked: Sequence[str]) -> list[str]:
    """Names of the scorers: those asked for, each for all tasks; else those of the benchmarks and their tasks."""
    named = list(asked) or [name for grid in grids for name in scorers_of(grid.benchmark, grid.tasks)]
    if not named:
        raise UserError("no scorer: the benchmark names none; pass --scorer NAME")
    return list(dict.fromkeys(named))


def scorers_of(benchmark: Benchmark, tasks: Sequence[Task]) -> list[str]:
    """The scorers that all tasks have, and `PER_TASK` where tasks have one that others lack.

    Raises:
        UserError: a task has several scorers that others lack; a matrix has one column a task.
    """
    own = {task.name: _own_names(benchmark, task) for task in tasks}
    common = [name for name in next(iter(own.values())) if all(name in names for names in own.values())]
    for task, names in own.items():
        extra = [name for name in names if name not in common]
        if len(extra) > 1:
            raise UserError(
                f"{benchmark.path}: task {task} has the scorers {', '.join(extra)}, which other tasks lack; a task can "
                "have one scorer of its own"
            )
    differ = any(set(names) - set(common) for names in own.values())
    return [*common, PER_TASK] if differ else common


def _own_names(benchmark: Benchmark, task: Task) -> list[str]:
    return list(dict.fromkeys(task.scorers or benchmark.scorers))


def _own_name(benchmark: Benchmark, tasks: Sequence[Task], task: Task) -> str:
    """The scorer of one task's column under `PER_TASK`: the one that not all tasks have, else its first."""
    lists = [_own_names(benchmark, other) for other in tasks]
    names = _own_names(benchmark, task)
    if not names:
        raise UserError(f"{benchmark.path}: task {task.name} has no scorer")
    return next((name for name in names if not all(name in other for other in lists)), names[0])


def check_scoring(
    benchmark: Benchmark, tasks: Sequence[Task], asked: Sequence[str] = (), given: ScorerOptions | None = None
) -> None:
    """Refuse unknown scorers and wrong settings, before anything is trained.

    Args:
        asked, given: what the command line says of scorers and their settings.

    Raises:
        UserError: names the first one.
    """
    for name in (*asked, *benchmark.scorers, *(name for task in tasks for name in task.scorers)):
        if name != PER_TASK:
            module(name)
    if not asked:
        scorers_of(benchmark, tasks)
    _check(given or {}, "--scorer_option")
    check_options(benchmark, tasks)


def load_scorers(
    grids: Sequence[Grid], names: Sequence[str], model: str | None, given: ScorerOptions
) -> list[list[GridScorer]]:
    """Make the scorers ready, one list for each grid; equal settings are loaded once.

    Args:
        model: what `--scorer_model` gave.
        given: settings of the command line, which win over the benchmark's and the tasks'.

    Raises:
        UserError: a scorer or a setting is unknown, something it needs is missing, or its direction differs between
            tasks.
    """
    _check(given, "--scorer_option")
    ready: dict[str, LoadedScorer] = {}
    found = []
    for grid in grids:
        check_options(grid.benchmark, grid.tasks)
        found.append([_for_grid(grid, name, model, given, ready) for name in names])
    return found


def check_options(benchmark: Benchmark, tasks: Sequence[Task]) -> None:
    """Refuse settings of unknown scorers and unknown settings, also of scorers that are not used now.

    Raises:
        UserError: there is one.
    """
    places: list[tuple[str, ScorerOptions]] = [("scorer_options", benchmark.scorer_options)]
    places += [(f"task {task.name}, scorer_options", task.scorer_options) for task in tasks]
    for place, settings in places:
        _check(settings, f"{benchmark.path}: {place}")


def _check(settings: ScorerOptions, where: str) -> None:
    for name, options in settings.items():
        try:
            found = module(name)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        parse(found, name, options, where)


def _for_grid(
    grid: Grid, name: str, model: str | None, given: ScorerOptions, ready: dict[str, LoadedScorer]
) -> GridScorer:
    by_task: dict[str, LoadedScorer] = {}
    for task in (task for part in grid.parts for task in part.tasks):
        used = _own_name(grid.benchmark, grid.tasks, task) if name == PER_TASK else name
        options = {
            **grid.benchmark.scorer_options.get(used, {}), **task.scorer_options.get(used, {}), **given.get(used, {})
        }  # fmt: skip
        key = sha256_json([used, options])
        if key not in ready:
            ready[key] = load(used, model, options, f"{grid.benchmark.path}: task {task.name}")
        by_task[task.name] = ready[key]
    directions = {task: scorer.higher_is_better for task, scorer in by_task.items()}
    if len(set(directions.values())) > 1:
        said = ", ".join(f"{task}: {'higher' if up else 'lower'}" for task, up in directions.items())
        raise UserError(f"{grid.benchmark.path}: scorer {name!r} must have one direction for all tasks, found {said}")
    return GridScorer(name, next(iter(directions.values())), by_task)


def score_cells(
    scorer: GridScorer, cells: Mapping[tuple[str, str], Sequence[Item]]
) -> dict[tuple[str, str], ScoredCell]:
    """Score the items of cells, each under (row, task), with one call for each task's settings."""
    scores: dict[tuple[str, str], list[Score]] = {}
    for loaded in {id(entry): entry for entry in scorer.by_task.values()}.values():
        own = [key for key in cells if scorer.by_task[key[1]] is loaded]
        if not own:
            continue  # of a view or a probe, which are scored apart
        flat = iter(loaded.score_items([item for key in own for item in cells[key]]))
        for key in own:
            scores[key] = [next(flat) for _ in cells[key]]
    return {key: _cell(scorer.by_task[key[1]], cells[key], scores[key]) for key in cells}


def _cell(scorer: LoadedScorer, items: Sequence[Item], scores: list[Score]) -> ScoredCell:
    reasons: dict[str, int] = {}
    for score in scores:
        if isinstance(score, Unscored):
            reasons[score.reason] = reasons.get(score.reason, 0) + 1
    numbers = [score for score in scores if not isinstance(score, Unscored)]
    value = scorer.cell(items, numbers) if items and not reasons else None
    problems = [f"{count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda entry: -entry[1])]
    return ScoredCell(value, scores, problems)


def facts(scorer: GridScorer, cells: Mapping[tuple[str, str], Sequence[Item]]) -> dict[str, Any]:
    """What the scorer says about how it scored: one object, or one for each group of tasks with equal settings."""
    groups: dict[int, list[str]] = {}
    asked = {task for _, task in cells}
    for task, loaded in ((task, loaded) for task, loaded in scorer.by_task.items() if task in asked):
        groups.setdefault(id(loaded), []).append(task)
    said = []
    for tasks in groups.values():
        items = [item for (_, task), own in cells.items() if task in tasks for item in own]
        said.append((tasks, scorer.by_task[tasks[0]].facts(items)))
    if len(said) == 1:
        return said[0][1]
    return {"by_task": [{"tasks": tasks, **found} for tasks, found in said if found]} if any(f for _, f in said) else {}


def reference_items(task: Task, rows: Sequence[Any]) -> list[Item]:
    """The turns of a task's test data, each answered by its own reference."""
    return [
        Item(reference, reference, question, task.name, task.system if row.system is None else row.system, row.id, turn)
        for row in rows
        for turn, (question, reference) in enumerate(row.turns)
    ]
