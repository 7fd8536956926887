"""From stored answers to results.json: pair by sample id and turn, score, leave a cell null unless it is complete.

results.json (schema 1) has for each scorer, beside `base`, `matrix`, `n`, `n_base` and `metrics`:

    range      lowest and highest score
    cell       how a cell comes from its answers
    by_task    the scorer of each task; only of `per_task`, which scores each task by its own
    floor      one a task: the score of shuffled references (see `floors`), null where there is none
    n_floor    how many wrong pairs the floor counts
    ceiling    new_acc: the diagonal; mtl and mtl_run: scores and name of joint training, null if none was found
    facts      what the scorer says about how it scored (encoder, signature, judge); absent if nothing

In a scenario of classification `seen` has {"tasks", "rows"}: after each stage the accuracy over the tasks seen so far.

A run that chooses an adapter for every question has `routing` beside `scorers`, see `routes.routing_results`.

Beside `scorers` a benchmark's views give `views` {view: {scorer: the same}}, its scenario `scenario` (see `scenarios`),
and its probes `probes` {"tasks", "scorers": {scorer: {"base", "rows", "change", "delta_g"}}}.

What lm-evaluation-harness found is `harness` {"settings", "metrics": {metric: {"higher_is_better", "tasks", "base",
"rows", "change", "delta_g"}}}, in its own units.

Scores of single answers are in RUN_DIR/scores, see `score_files`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from swift_cl.evaluation.floors import joint_row, results_beside, shuffled
from swift_cl.evaluation.harness import harness_results
from swift_cl.evaluation.metrics import Cell, Matrix, compute
from swift_cl.evaluation.plan import Grid, Target
from swift_cl.evaluation.questions import base_of, wanted_keys
from swift_cl.evaluation.routes import Routes, routing_results
from swift_cl.evaluation.scenarios import general_ability, scenario_metrics, seen_accuracy
from swift_cl.evaluation.score_files import write_scores
from swift_cl.evaluation.scorers import Item
from swift_cl.evaluation.scoring import MEAN, PER_TASK, GridScorer, ScoredCell, facts, reference_items, score_cells
from swift_cl.evaluation.settings import load_settings
from swift_cl.evaluation.store import AnswerStore
from swift_cl.io import write_json
from swift_cl.stream.benchmark import Task
from swift_cl.stream.rows import Row

RESULTS_SCHEMA = 1
RESULTS_FILE = "results.json"
FLOOR_ROW = "shuffled references"
"""A row beside `base` and the stages' folders; no folder has this name, for it has a space."""


@dataclass(frozen=True)
class CellAnswers:
    """The answers of one cell.

    Attributes:
        items: every answered turn.
        keys: the stored answers' keys, one for each item.
        expected: turns of the test data.
        problems: why answers are missing, each reason with its count, the most frequent first.
        cut: answers that ended at the token limit.
        tokens: length of all answers, None where the endpoint did not tell that of each.
    """

    items: list[Item]
    keys: list[str]
    expected: int
    problems: list[str]
    cut: int = 0
    tokens: int | None = None

    @property
    def complete(self) -> bool:
        """Whether every turn was answered."""
        return len(self.items) == self.expected


def cell_answers(
    store: AnswerStore,
    turns: Sequence[Item],
    weights: str | Mapping[str, str | None],
    wanted: Mapping[tuple[str, int], str] | None = None,
) -> CellAnswers:
    """Pair answers with references by sample id and turn.

    Args:
        turns: all turns of the test data, each answered by its reference.
        weights: what must have answered; by sample id for a stage that routes, None where no choice was made yet.

    An answer counts only if it answers the question that the data has today, by the weights that the stage has today,
    and, with `wanted` (keys by sample id and turn), under the settings of today.
    """
    items: list[Item] = []
    keys: list[str] = []
    reasons: dict[str, int] = {}
    cut = 0
    tokens: list[int | None] = []
    for turn in turns:
        answer = store.latest(turn.id, turn.turn)
        expected = weights if isinstance(weights, str) else weights.get(turn.id)
        if answer is None:
            reason = "not asked yet"
        elif expected is None:
            reason = "not routed yet"
        elif answer.get("question") != turn.question:
            reason = "the stored answer is for another question; the data changed"
        elif answer.get("weights") != expected:
            reason = (
                "the stored answer is from other weights; the stage was trained again"
                if isinstance(weights, str)
                else "the stored answer is from another adapter than the router chooses now"
            )
        elif "error" in answer:
            reason = str(answer["error"])
        elif wanted is not None and wanted.get((turn.id, turn.turn)) != answer["key"]:
            reason = "the stored answer was asked with other settings, another prompt or history"
        else:
            items.append(replace(turn, answer=answer["answer"]))
            keys.append(answer["key"])
            cut += answer.get("finish") == "length"
            tokens.append(answer.get("tokens"))
            continue
        reasons[reason] = reasons.get(reason, 0) + 1
    problems = [f"{count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1])]
    return CellAnswers(items, keys, len(turns), problems, cut, total(tokens))


def total(counts: Iterable[int | None]) -> int | None:
    """The sum; None where one is not known."""
    found = list(counts)
    return None if None in found else sum(count for count in found if count is not None)


def _weights(
    grid: Grid, target: Target, task: Task, rows: Sequence[Row], routes: Routes
) -> str | Mapping[str, str | None]:
    """What must have answered a cell's questions."""
    if not target.choices:
        return target.weights
    chosen = {row.id: routes.answers(grid, target, task, row) for row in rows}
    return {sample: None if found is None else found[0].weights for sample, found in chosen.items()}


@dataclass(frozen=True)
class Scored:
    """A run's results and what is wrong with them.

    Attributes:
        results: the content of results.json.
        problems: one line for each cell or row that is null, and for each cell that a scorer could not score.
    """

    results: dict[str, Any]
    problems: list[str]


def stored_routes(grid: Grid) -> Routes:
    """The choices under which a run was asked last."""
    asked = load_settings(grid.run.dir)
    base = base_of(grid, grid.base) if asked is None else asked[1]
    return Routes("stage" if asked is None else asked[0].system, {grid.run.dir: base})


def collect(grid: Grid) -> tuple[dict[tuple[str, str], CellAnswers], list[str]]:
    """The answers of every cell by (row, task), and one line for each cell or row that cannot be scored."""
    problems: list[str] = []
    cells: dict[tuple[str, str], CellAnswers] = {}
    turns = {task.name: reference_items(task, rows) for task, rows in zip(grid.tasks, grid.rows, strict=True)}
    asked = load_settings(grid.run.dir)
    routes = stored_routes(grid)
    for target in grid.targets:
        for task, rows in zip(grid.tasks, grid.rows, strict=True):
            store = grid.store(target, task)
            wanted = None if asked is None else wanted_keys(grid, target, task, rows, store, *asked, routes.answers)
            labels = grid.visible(target, task)
            own = [replace(turn, labels=labels) for turn in turns[task.name]] if labels else turns[task.name]
            found = cell_answers(store, own, _weights(grid, target, task, rows, routes), wanted)
            cells[target.row, task.name] = found
            if not found.complete:
                missing = found.expected - len(found.items)
                detail = "; ".join(found.problems[:3])
                problems.append(f"{target.row} x {task.name}: {missing} of {found.expected} answers missing ({detail})")
    for index, stage in enumerate(grid.stages):
        if stage is None and not grid.is_part:
            problems.append(f"stage {index + 1} ({grid.tasks[index].name}) is not trained yet; its row is null")
    return cells, problems


def score_grids(grids: Sequence[Grid], scorers: Sequence[Sequence[GridScorer]], backend: str) -> list[Scored]:
    """Score what is stored, and write each run's results.json and its scores.

    Args:
        scorers: those of each grid.
    """
    scored = [score_grid(grid, own, backend) for grid, own in zip(grids, scorers, strict=True)]
    for grid, entry in zip(grids, scored, strict=True):
        others = [*(other.results for other in scored), *results_beside(grid.run.dir, RESULTS_FILE)]
        for name, values in entry.results["scorers"].items():
            joint = joint_row(others, entry.results, name)
            values["ceiling"] |= {"mtl": joint and joint[1], "mtl_run": joint and joint[0]}
        write_json(grid.run.dir / RESULTS_FILE, entry.results)
    return scored


def score_grid(grid: Grid, scorers: Sequence[GridScorer], backend: str) -> Scored:
    """Score what is stored of one run, and write the scores of its answers."""
    cells, problems = collect(grid)
    found = {}
    for scorer in scorers:
        found[scorer.name], own = _score_one(grid, scorer, cells)
        problems = problems + own
    results = {
        "schema": RESULTS_SCHEMA,
        "benchmark": grid.benchmark.name,
        "order": [task.name for task in grid.tasks],
        "method": grid.run.method,
        "model": grid.run.model,
        "model_id": grid.base.weights,
        "backend": backend,
        "seed": grid.run.seed,
        "name": grid.run.name,
        "scorers": found,
        "answers": {
            "expected": [cells[grid.base.row, task.name].expected for task in grid.tasks],
            "cut_at_max_tokens": sum(cell.cut for cell in cells.values()),
            "tokens": total(cell.tokens for cell in cells.values()),
        },
        "problems": problems,
    }
    routing = routing_results(grid, stored_routes(grid))
    if routing is not None:
        results["routing"] = routing
    results |= _score_parts(grid, scorers, found, problems)
    general = harness_results(grid)
    if general is not None:
        results["harness"] = general
    return Scored(results, problems)


def _score_parts(
    grid: Grid, scorers: Sequence[GridScorer], main: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    """What results.json says of views and probes; nothing for a benchmark without."""
    found: dict[str, Any] = {}
    views: dict[str, dict[str, Any]] = {}
    for name, view in grid.views.items():
        cells, own = collect(view)
        problems += own
        for scorer in scorers:
            views.setdefault(name, {})[scorer.name], own = _score_one(view, scorer, cells)
            problems += own
    if views:
        found["views"] = views
    if grid.benchmark.scenario is not None:
        found["scenario"] = scenario_metrics(grid.benchmark.scenario, main, views)
    if grid.probe is not None:
        cells, own = collect(grid.probe)
        problems += own
        found["probes"] = {
            "tasks": [task.name for task in grid.probe.tasks],
            "scorers": {scorer.name: score_probe(grid.probe, scorer, cells) for scorer in scorers},
        }
    return found


def score_probe(grid: Grid, scorer: GridScorer, cells: Mapping[tuple[str, str], CellAnswers]) -> dict[str, Any]:
    """A scorer's part of the probes: a row a model, a column a probe, and how they changed."""
    done = score_cells(scorer, {key: found.items for key, found in cells.items()})
    for (row, task), found in cells.items():
        write_scores(grid.run.dir, scorer.name, row, task, found.items, found.keys, done[row, task].scores)

    def row_of(target: Target | None) -> list[Cell]:
        keys = [] if target is None else [(target.row, task.name) for task in grid.tasks]
        return [done[key].value if cells[key].complete else None for key in keys] or [None] * len(grid.tasks)

    base, rows = row_of(grid.base), [row_of(target) for target in grid.stages]
    return {"base": base, "rows": rows, **general_ability(base, rows[-1], scorer.higher_is_better)}


def _score_one(
    grid: Grid, scorer: GridScorer, cells: Mapping[tuple[str, str], CellAnswers]
) -> tuple[dict[str, Any], list[str]]:
    """A scorer's part of results.json, and one line for each cell with answers that it could not score."""
    items = {key: found.items for key, found in cells.items()}
    wrong = _wrong_answers(grid) if scorer.has_floor else {}
    done = score_cells(scorer, {**items, **wrong})
    for (row, task), found in cells.items():
        write_scores(grid.run.dir, scorer.name, row, task, found.items, found.keys, done[row, task].scores)

    def cell(target: Target | None, task: Task) -> tuple[Cell, int]:
        if target is None:
            return None, 0
        found, scored = cells[target.row, task.name], done[target.row, task.name]
        return scored.value if found.complete else None, len(scored.scores) - scored.unscored

    base = [cell(grid.base, task) for task in grid.tasks]
    rows = [[cell(target, task) for task in grid.tasks] for target in grid.stages]
    matrix = Matrix(
        tuple(task.name for task in grid.tasks),
        tuple(tuple(score for score, _ in row) for row in rows),
        tuple(score for score, _ in base),
    )
    floors = [done.get((FLOOR_ROW, task.name), ScoredCell(None, [])) for task in grid.tasks]
    result = {
        "higher_is_better": scorer.higher_is_better,
        "range": list(scorer.range),
        "cell": scorer.cell,
        **({"by_task": {task.name: scorer.names[task.name] for task in grid.tasks}} if scorer.name == PER_TASK else {}),
        "base": list(matrix.base or ()),
        "matrix": [list(row) for row in matrix.rows],
        "n": [[count for _, count in row] for row in rows],
        "n_base": [count for _, count in base],
        "floor": [floor.value for floor in floors],
        "n_floor": [len(floor.scores) for floor in floors],
        "ceiling": {"new_acc": [row[index] for index, row in enumerate(matrix.rows)]},
        "metrics": compute(matrix, scorer.higher_is_better).as_json(),
    }
    if grid.labels:
        result["seen"] = seen_accuracy(matrix.rows, [[count for _, count in row] for row in rows], scorer.cell == MEAN)
    said = facts(scorer, items)
    problems = [
        f"{scorer.name}, {row} x {task}: {done[row, task].unscored} of {len(found.items)} answers have no score "
        f"({'; '.join(done[row, task].problems[:3])})"
        for (row, task), found in cells.items()
        if done[row, task].problems
    ]
    return (result | {"facts": said} if said else result), problems


def _wrong_answers(grid: Grid) -> dict[tuple[str, str], list[Item]]:
    """Shuffled references of each task, as cells of a row of their own."""
    return {
        (FLOOR_ROW, task.name): shuffled(reference_items(task, rows))
        for task, rows in zip(grid.tasks, grid.rows, strict=True)
    }
