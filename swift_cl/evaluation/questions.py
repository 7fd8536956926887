"""From grids to dialogues: which question goes to which model, with which system prompt, and where its answer goes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from swift_cl.errors import RunFailure
from swift_cl.evaluation.ask import Dialogue, keys, opening
from swift_cl.evaluation.pictures import Message
from swift_cl.evaluation.pictures import questions as asked
from swift_cl.evaluation.plan import Grid, Target, system_prompt
from swift_cl.evaluation.settings import Settings
from swift_cl.evaluation.store import AnswerStore, answer_path
from swift_cl.io import sha256_json
from swift_cl.stream.benchmark import Task
from swift_cl.stream.rows import Row

PROBES = 3


class Stores:
    """Opens every answer file once."""

    def __init__(self) -> None:
        self._open: dict[Path, AnswerStore] = {}

    def __call__(self, grid: Grid, target: Target, task: str) -> AnswerStore:
        path = answer_path(grid.run.dir, target.row, task).resolve()
        if path not in self._open:
            self._open[path] = AnswerStore(path)
        return self._open[path]


def base_of(grid: Grid, target: Target) -> str:
    """Identity of what lies below a target's adapter: the model's weights (its own for a full model), and how they are
    loaded (type, template, dtype)."""
    weights = grid.base.weights if target.deployment == grid.base.deployment else target.weights
    return sha256_json([weights, dict(target.deployment.model_args)])


Answering = Callable[[Grid, Target, Task, Row], tuple[Target, str | None] | None]
"""(the model that answers a question, name of the choice or None); None where the question was not routed yet."""


def itself(grid: Grid, target: Target, task: Task, row: Row) -> tuple[Target, str | None]:
    """For runs that do not route."""
    return target, None


def allowed(grid: Grid, target: Target, task: Task) -> tuple[str, ...]:
    """The visible labels in an order that does not depend on the tasks' order, so that equal sets are asked alike."""
    return tuple(sorted(grid.visible(target, task)))


def dialogues(
    targets: Sequence[tuple[Grid, Target]],
    served: Callable[[Target], str],
    policy: str,
    stores: Callable[[Grid, Target, str], AnswerStore],
    answers: Answering = itself,
    constrained: bool = False,
) -> list[Dialogue]:
    """All dialogues of a server, model by model, so that batches are of one adapter; those that runs share once.

    Args:
        constrained: whether an answer can only be a visible label.

    Raises:
        RunFailure: a question was not routed.
    """
    merged: dict[str, tuple[Dialogue, list[AnswerStore]]] = {}
    for grid, target in targets:
        base = base_of(grid, target)
        for task, rows in zip(grid.tasks, grid.rows, strict=True):
            store = stores(grid, target, task.name)
            labels = allowed(grid, target, task) if constrained else ()
            for row in rows:
                chosen = answers(grid, target, task, row)
                if chosen is None:
                    raise RunFailure(f"{grid.run.dir}: {target.row} x {task.name}, {row.id!r} was not routed")
                model, routed = chosen
                system = system_prompt(policy, model, task, row)
                key = sha256_json([model.weights, task.name, system, row.id, row.content_hash, routed, labels])
                found = Dialogue(served(model), model.weights, base, system, row, (), routed, task.name, labels)
                merged.setdefault(key, (found, []))[1].append(store)
    ordered = sorted(merged.values(), key=lambda item: item[0].served)
    return [replace(d, stores=tuple(dict.fromkeys(own))) for d, own in ordered]


def wanted_keys(
    grid: Grid,
    target: Target,
    task: Task,
    rows: Sequence[Row],
    store: AnswerStore,
    settings: Settings,
    base: str,
    answers: Answering = itself,
) -> Mapping[tuple[str, int], str]:
    """For each sample id and turn of a cell the key that its answer must have to count; none where not routed yet.

    Args:
        base: `base_of` the run's base model when it was asked (scoring needs no model, which may be elsewhere).
    """
    wanted: dict[tuple[str, int], str] = {}
    labels = allowed(grid, target, task) if settings.constrained else ()
    below = base if target.deployment == grid.base.deployment else base_of(grid, target)
    for row in rows:

        def answered(turn: int, key: str, row: Row = row) -> str | None:
            latest = store.latest(row.id, turn)
            return None if latest is None or latest["key"] != key else latest.get("answer")

        chosen = answers(grid, target, task, row)
        if chosen is None:
            continue
        system = system_prompt(settings.system, chosen[0], task, row)
        dialogue = Dialogue("", chosen[0].weights, below, system, row, (), task=task.name, labels=labels)
        wanted.update({(row.id, turn): key for turn, key in enumerate(keys(dialogue, settings, answered))})
    return wanted


def probes(grids: Sequence[Grid]) -> list[list[Message]]:
    """The first question of the first few tasks, under the task's system prompt."""
    grid = grids[0]
    found = []
    for task, rows in list(zip(grid.tasks, grid.rows, strict=True))[:PROBES]:
        row = rows[0]
        base = grid.base
        dialogue = Dialogue(base.served, base.weights, "", system_prompt("task", base, task, row), row, ())
        found.append([*opening(dialogue), asked(row)[0]])
    return found
