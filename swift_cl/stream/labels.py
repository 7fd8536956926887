"""Classification tasks: which labels a task has, and a check that its rows are answered by them.

A task's labels are those that the benchmark file declares, else those that the format knows of its rows, else the
distinct answers of all its training rows (whatever `train_limit` says: the labels are the task's).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from swift_cl.errors import UserError
from swift_cl.io import read_text
from swift_cl.stream.benchmark import Benchmark, Task
from swift_cl.stream.benchmark_file import CLASSIFICATION
from swift_cl.stream.rows import Row


def labels_of(
    benchmark: Benchmark, tasks: Sequence[Task], rows: Iterable[Sequence[Row]]
) -> tuple[tuple[str, ...], ...]:
    """Each task's labels, in their order; none for a benchmark whose scenario is no classification.

    Args:
        rows: the test rows of each task.

    Raises:
        UserError: labels cannot be had, or a test row has an answer that is none of them, or several turns.
    """
    if benchmark.scenario not in CLASSIFICATION:
        return ()
    found = []
    for task, own in zip(tasks, rows, strict=True):
        labels, source = _labels(task, own)
        check_answers(task, own, labels, source)
        found.append(labels)
    return tuple(found)


def _labels(task: Task, rows: Sequence[Row]) -> tuple[tuple[str, ...], str]:
    """The labels, and where they stand, for an error."""
    if isinstance(task.labels, Path):
        return _unique(_read(task.labels), str(task.labels)), str(task.labels)
    where = f"task {task.name!r}"
    if task.labels:
        return _unique(task.labels, f"{where}, labels"), "the task's labels"
    if all(row.labels for row in rows):
        return tuple(dict.fromkeys(label for row in rows for label in row.labels)), "the labels of its rows"
    answers = [row.turns[-1][1] for row in replace(task, train_limit=None).train_rows()]
    return _unique(dict.fromkeys(answers), f"{task.train}"), f"the answers in {task.train}"


def _read(file: Path) -> list[str]:
    """A label file: a JSON list of texts, or one label a line."""
    if not file.is_file():
        raise UserError(f"{file}: label file not found")
    text = read_text(file)
    if file.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise UserError(f"{file}: expected a list of labels")
    return value


def _unique(labels: Iterable[str], where: str) -> tuple[str, ...]:
    """The labels, none of them empty and no two alike."""
    found: list[str] = []
    for label in labels:
        if not label.strip():
            raise UserError(f"{where}: a label is empty")
        if label in found:
            raise UserError(f"{where}: the label {label!r} is named twice")
        found.append(label)
    if not found:
        raise UserError(f"{where}: no labels")
    return tuple(found)


def check_answers(task: Task, rows: Sequence[Row], labels: Sequence[str], source: str = "the task's labels") -> None:
    """Refuse rows that are not answered by one of the labels.

    Raises:
        UserError: names file and row.
    """
    for row in rows:
        if len(row.turns) != 1:
            raise UserError(
                f"{task.test}, id {row.id!r}: {len(row.turns)} turns, a row of a classification task has one"
            )
        answer = row.turns[0][1]
        if answer not in labels:
            shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
            raise UserError(f"{task.test}, id {row.id!r}: the answer {answer!r} is not among {source}: {shown}")
