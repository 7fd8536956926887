"""Which adapter answers each question of a run that routes: chosen once, kept beside the answers.

RUN_DIR/routes/<stage folder>/<task>.jsonl, one JSON line a question:

    {"id": sample id, "turn": 0, "key": ..., "chosen": name of the adapter, "scores": {name: number}, "router": hash}

The key covers question, system prompts, adapters, base model, and the router's state and settings (`router` is the hash
of the last three), so whatever changed is routed again and nothing else. A dialogue is routed once, by its first
question. Nothing is stored where there is nothing to choose: one adapter, or a task that is given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation.plan import Choice, Grid, Target, system_prompt
from swift_cl.evaluation.store import AnswerStore
from swift_cl.io import sha256_json
from swift_cl.progress import progress_bar
from swift_cl.serving.routing import Question, Routed, RouteJob, job_of, run_jobs
from swift_cl.stream.benchmark import Task
from swift_cl.stream.rows import Row

ROUTES_DIR = "routes"


def route_path(run_dir: Path, row_name: str, task: str) -> Path:
    """File of one cell's routes."""
    return run_dir / ROUTES_DIR / row_name / f"{task}.jsonl"


class Routes:
    """The choices of runs, read from their files.

    Args:
        policy: see `plan.system_prompt`.
        bases: identity of each grid's base model, by run folder.
    """

    def __init__(self, policy: str, bases: dict[Path, str]) -> None:
        self._policy, self._bases = policy, bases
        self._stores: dict[Path, AnswerStore] = {}

    def store(self, grid: Grid, target: Target, task: Task) -> AnswerStore:
        """The routes of a cell."""
        path = route_path(grid.run.dir, target.row, task.name)
        if path not in self._stores:
            self._stores[path] = AnswerStore(path)
        return self._stores[path]

    def choice(self, grid: Grid, target: Target, task: Task, row: Row) -> Choice | None:
        """What answers a question of a stage that routes; None where it was not routed yet."""
        if target.task_id_given:
            return next((choice for choice in target.choices if task.name in choice.tasks), target.choices[-1])
        if len(target.choices) == 1:
            return target.choices[0]
        found = self.store(grid, target, task).latest(row.id, 0)
        if found is None or found["key"] != self.question(grid, target, task, row).key:
            return None
        return next((choice for choice in target.choices if choice.name == found["chosen"]), None)

    def answers(self, grid: Grid, target: Target, task: Task, row: Row) -> tuple[Target, str | None] | None:
        """(the model that answers, name of the choice or None); None where the question was not routed yet."""
        if not target.choices:
            return target, None
        choice = self.choice(grid, target, task, row)
        return None if choice is None else (choice.target, choice.name)

    def router(self, grid: Grid, target: Target) -> str:
        """Identity of a stage's router: base model, method with settings and state, adapters."""
        assert target.stage is not None
        assert target.stage.route is not None
        route = {key: value for key, value in target.stage.route.items() if key != "candidates"}
        adapters = [[choice.name, choice.target.weights] for choice in target.choices]
        return sha256_json([self._bases[grid.run.dir], target.stage.method, route, adapters])

    def question(self, grid: Grid, target: Target, task: Task, row: Row) -> Question:
        """A question as its router sees it: neither the answer nor the task.

        Raises:
            UserError: it has images, which routers do not see.
        """
        if row.images:
            raise UserError(
                f"{grid.run.dir}: task {task.name!r}, {row.id!r} has images, but method {grid.run.method!r} chooses an "
                "adapter by text; allowed: methods that answer with one adapter"
            )
        messages = [{"role": "user", "content": row.turns[0][0]}]
        systems = {c.name: system_prompt(self._policy, c.target, task, row) for c in target.choices}
        system = None if self._policy == "none" else row.system
        key = sha256_json([self.router(grid, target), messages, systems, system])
        return Question(key, messages, systems, system)

    def fill(self, grids: Sequence[Grid], notify: Callable[[str], None]) -> None:
        """Route what has no choice yet, one process a run.

        Raises:
            UserError, RunFailure: see `run_jobs`; what was routed before is kept.
        """
        for grid in grids:
            missing = _Missing(self, grid)
            if missing.jobs:
                log = grid.run.dir / "logs" / "route.log"
                notify(f"routing {len(missing.places)} questions of {grid.run.dir}, the log is {log}")
                with progress_bar("routing", len(missing.places), "q") as bar:
                    run_jobs(grid.run.model, grid.run.model_args, missing.jobs, log, partial(missing.keep, bar))
                missing.check()


@dataclass(frozen=True)
class _Place:
    store: AnswerStore
    sample: str
    router: str


class _Missing:
    """The questions of a run that have no choice yet, and the places of their choices."""

    def __init__(self, routes: Routes, grid: Grid) -> None:
        self.places: dict[str, list[_Place]] = {}
        self.jobs: list[RouteJob] = []
        for target in grid.targets:
            questions = []
            for task, rows in zip(grid.tasks, grid.rows, strict=True):
                for row in rows:
                    if target.choices and routes.choice(grid, target, task, row) is None:
                        question = routes.question(grid, target, task, row)
                        if question.key not in self.places:
                            questions.append(question)
                        place = _Place(routes.store(grid, target, task), row.id, routes.router(grid, target))
                        self.places.setdefault(question.key, []).append(place)
            if questions:
                assert target.stage is not None
                self.jobs.append(job_of(target.stage, questions))

    def keep(self, bar: Any, routed: Routed) -> None:
        """Store a choice wherever its question stands."""
        bar.update()
        for place in self.places.pop(routed.key, []):
            place.store.append(
                {
                    "id": place.sample,
                    "turn": 0,
                    "key": routed.key,
                    "chosen": routed.chosen,
                    "scores": routed.scores,
                    "router": place.router,
                }
            )

    def check(self) -> None:
        """Whether every question got its choice."""
        if self.places:
            raise RunFailure(f"the router left {len(self.places)} questions without a choice")


def routing_results(grid: Grid, routes: Routes) -> dict[str, Any] | None:
    """What results.json says about routing; None for a run that does not route.

    Returns:
        `task_id_given`; `accuracy`: percent of each cell's questions that got an adapter of their own task, null where
        the stage has none for that task or questions are not routed yet; `n`: routed questions; `chosen`: how many got
        which adapter. Rows are stages, columns tasks.
    """
    stages = [target for target in grid.stages if target is not None and target.choices]
    if not stages:
        return None
    found: dict[str, Any] = {
        "task_id_given": all(stage.task_id_given for stage in stages),
        "accuracy": [],
        "n": [],
        "chosen": [],
    }
    for target in grid.stages:
        cells = [
            [] if target is None else [routes.choice(grid, target, task, row) for row in rows] if target.choices else []
            for task, rows in zip(grid.tasks, grid.rows, strict=True)
        ]
        known = {task for choice in (target.choices if target else ()) for task in choice.tasks}
        found["accuracy"].append(
            [_accuracy(task.name, cell, known) for task, cell in zip(grid.tasks, cells, strict=True)]
        )
        found["n"].append([sum(choice is not None for choice in cell) for cell in cells])
        found["chosen"].append([_counts(cell) for cell in cells])
    return found


def method_of(results: Mapping[str, Any]) -> str:
    """The method of a results.json as tables call it: one that is told each question's task compares with no other."""
    given = results.get("routing", {}).get("task_id_given")
    return f"{results['method']}, task id given" if given else str(results["method"])


def _accuracy(task: str, cell: Sequence[Choice | None], known: set[str]) -> float | None:
    if task not in known or not cell or None in cell:
        return None
    return 100 * sum(choice is not None and task in choice.tasks for choice in cell) / len(cell)


def _counts(cell: Sequence[Choice | None]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for choice in cell:
        if choice is not None:
            counts[choice.name] = counts.get(choice.name, 0) + 1
    return counts
