"""From stored answers to results.json: pair by sample id and turn, score, leave a cell null unless it is complete."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift_cl.errors import UserError
from swift_cl.evaluation.metrics import Cell, Matrix, compute
from swift_cl.evaluation.plan import Grid, Target
from swift_cl.evaluation.questions import wanted_keys
from swift_cl.evaluation.scorers import LoadedScorer
from swift_cl.evaluation.settings import load_settings
from swift_cl.evaluation.store import AnswerStore
from swift_cl.io import write_json
from swift_cl.stream.benchmark import Task
from swift_cl.stream.rows import Row

RESULTS_SCHEMA = 1
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class CellAnswers:
    """The answers of one cell.

    Attributes:
        pairs: (answer, reference) of every answered turn.
        expected: turns of the test data.
        problems: why answers are missing, each reason with its count, the most frequent first.
        cut: answers that ended at the token limit.
    """

    pairs: list[tuple[str, str]]
    expected: int
    problems: list[str]
    cut: int = 0

    @property
    def complete(self) -> bool:
        """Whether every turn was answered."""
        return len(self.pairs) == self.expected


def cell_answers(
    store: AnswerStore, rows: Sequence[Row], weights: str, wanted: Mapping[tuple[str, int], str] | None = None
) -> CellAnswers:
    """Pair answers with references by sample id and turn.

    An answer counts only if it answers the question that the data has today, by the weights that the stage has today,
    and, with `wanted` (keys by sample id and turn), under the settings of today.
    """
    pairs: list[tuple[str, str]] = []
    reasons: dict[str, int] = {}
    cut = 0
    for row in rows:
        for turn, (question, reference) in enumerate(row.turns):
            answer = store.latest(row.id, turn)
            if answer is None:
                reason = "not asked yet"
            elif answer.get("question") != question:
                reason = "the stored answer is for another question; the data changed"
            elif answer.get("weights") != weights:
                reason = "the stored answer is from other weights; the stage was trained again"
            elif "error" in answer:
                reason = str(answer["error"])
            elif wanted is not None and wanted.get((row.id, turn)) != answer["key"]:
                reason = "the stored answer was asked with other settings, another prompt or history"
            else:
                pairs.append((answer["answer"], reference))
                cut += answer.get("finish") == "length"
                continue
            reasons[reason] = reasons.get(reason, 0) + 1
    problems = [f"{count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1])]
    return CellAnswers(pairs, sum(len(row.turns) for row in rows), problems, cut)


@dataclass(frozen=True)
class Scored:
    """A run's results and what is wrong with them.

    Attributes:
        results: the content of results.json.
        problems: one line for each cell that is null.
    """

    results: dict[str, Any]
    problems: list[str]


def collect(grid: Grid) -> tuple[dict[tuple[str, str], CellAnswers], list[str]]:
    """The answers of every cell by (row, task), and one line for each cell or row that cannot be scored."""
    problems: list[str] = []
    cells: dict[tuple[str, str], CellAnswers] = {}
    asked = load_settings(grid.run.dir)
    for target in grid.targets:
        for task, rows in zip(grid.tasks, grid.rows, strict=True):
            store = grid.store(target, task)
            wanted = None if asked is None else wanted_keys(grid, target, task, rows, store, *asked)
            found = cell_answers(store, rows, target.weights, wanted)
            cells[target.row, task.name] = found
            if not found.complete:
                missing = found.expected - len(found.pairs)
                detail = "; ".join(found.problems[:3])
                problems.append(f"{target.row} x {task.name}: {missing} of {found.expected} answers missing ({detail})")
    for index, stage in enumerate(grid.stages):
        if stage is None:
            problems.append(f"stage {index + 1} ({grid.tasks[index].name}) is not trained yet; its row is null")
    return cells, problems


def score_grid(grid: Grid, scorers: Sequence[LoadedScorer], backend: str) -> Scored:
    """Score what is stored, and write results.json."""
    cells, problems = collect(grid)
    results = {
        "schema": RESULTS_SCHEMA,
        "benchmark": grid.benchmark.name,
        "order": [task.name for task in grid.tasks],
        "method": grid.run.method,
        "model": grid.run.model,
        "backend": backend,
        "seed": grid.run.seed,
        "name": grid.run.name,
        "scorers": {scorer.name: _score_one(grid, scorer, cells) for scorer in scorers},
        "answers": {
            "expected": [cells[grid.base.row, task.name].expected for task in grid.tasks],
            "cut_at_max_tokens": sum(cell.cut for cell in cells.values()),
        },
        "problems": problems,
    }
    write_json(grid.run.dir / RESULTS_FILE, results)
    return Scored(results, problems)


def _score_one(grid: Grid, scorer: LoadedScorer, cells: dict[tuple[str, str], CellAnswers]) -> dict[str, Any]:
    def cell(target: Target | None, task: Task) -> tuple[Cell, int]:
        if target is None:
            return None, 0
        found = cells[target.row, task.name]
        if not found.complete:
            return None, len(found.pairs)
        scores = scorer.score(found.pairs)
        return sum(scores) / len(scores), len(scores)

    base = [cell(grid.base, task) for task in grid.tasks]
    rows = [[cell(target, task) for task in grid.tasks] for target in grid.stages]
    matrix = Matrix(
        tuple(task.name for task in grid.tasks),
        tuple(tuple(score for score, _ in row) for row in rows),
        tuple(score for score, _ in base),
    )
    return {
        "higher_is_better": scorer.higher_is_better,
        "base": list(matrix.base or ()),
        "matrix": [list(row) for row in matrix.rows],
        "n": [[count for _, count in row] for row in rows],
        "n_base": [count for _, count in base],
        "metrics": compute(matrix, scorer.higher_is_better).as_json(),
    }


def choose_scorers(grids: Sequence[Grid], asked: Sequence[str]) -> list[str]:
    """Names of the scorers: those asked for, else those of the benchmarks and their tasks; each for all tasks."""
    named = list(asked) or [
        name for grid in grids for name in (*grid.benchmark.scorers, *(s for task in grid.tasks for s in task.scorers))
    ]
    if not named:
        raise UserError("no scorer: the benchmark names none; pass --scorer NAME")
    return list(dict.fromkeys(named))
