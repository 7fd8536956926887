"""The classes of a stream of classification tasks, numbered once for all tasks in the tasks' order, and what methods
with a head over them share."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.methods.base import Support, TrainingRow

CLASSIFIER_SUPPORT = Support(
    tuners=("lora",), full_deepspeed=(), packing=False, quantized=False, sequence_parallel=False, liger=False
)


def refuse_images(method: str, task: str, rows: Sequence[TrainingRow]) -> None:
    """A method that classifies reads text alone."""
    shown = next((number for number, row in enumerate(rows) if row.get("images")), None)
    if shown is not None:
        raise UserError(f"method '{method}' classifies text, but row {shown} of task '{task}' has images")


class ClassTable:
    """Numbers of all classes.

    Args:
        tasks: the labels of each task, in the order of learning.
    """

    def __init__(self, tasks: Mapping[str, Sequence[str]]) -> None:
        self.tasks = {task: tuple(labels) for task, labels in tasks.items()}
        self.labels = tuple(label for own in self.tasks.values() for label in own)
        self._numbers = {label: number for number, label in enumerate(self.labels)}

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, task: str) -> list[int]:
        """The numbers of a task's classes.

        Raises:
            UserError: the table has no such task.
        """
        if task not in self.tasks:
            raise UserError(f"task {task!r} has no labels; --cl_task must be one of: {', '.join(self.tasks)}")
        return [self._numbers[label] for label in self.tasks[task]]

    def labelled(self, task: str, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
        """Rows of a task as ms-swift's `--task_type seq_cls` reads them: without the answer, with its class's number.

        Raises:
            UserError: a row has several turns, or an answer that is none of the task's labels.
        """
        own = {self.labels[number]: number for number in self.of(task)}
        found = []
        for position, row in enumerate(rows):
            *asked, answer = row["messages"]
            if sum(message["role"] == "user" for message in asked) != 1:
                raise UserError(f"task {task!r}, row {position}: several turns; a row of a classification task has one")
            if answer["content"] not in own:
                raise UserError(
                    f"task {task!r}, row {position}: the answer {answer['content'][:60]!r} is none of the task's "
                    f"labels: {', '.join(own)}"
                )
            found.append({**row, "messages": asked, "label": own[answer["content"]]})
        return found


def parse_labels(text: str, flag: str) -> ClassTable:
    """The classes from a flag: `{"task": ["label", ...], ...}`, as JSON text or the name of a file with it.

    Raises:
        UserError: it cannot be read, or a label stands in two tasks.
    """
    value: Any = None
    if text.lstrip().startswith("{"):
        content = text
    elif text and Path(text).is_file():
        content = Path(text).read_text(encoding="utf-8")
    else:
        found = f"{text!r} is no file" if text else "it is missing (`swift-cl run` sets it from the benchmark)"
        raise UserError(f'{flag}: expected {{"task": ["label", ...], ...}} or a JSON file with it, {found}')
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UserError(f"{flag}: not valid JSON ({error})") from None
    right = isinstance(value, dict) and all(
        isinstance(own, list) and own and all(isinstance(label, str) and label for label in own)
        for own in value.values()
    )
    if not right or not value:
        raise UserError(f'{flag}: expected {{"task": ["label", ...], ...}}')
    owner: dict[str, str] = {}
    for task, own in value.items():
        for label in own:
            if label in owner:
                raise UserError(f"{flag}: the label {label!r} stands in {owner[label]!r} and in {task!r}")
            owner[label] = task
    return ClassTable(value)


class Classifying:
    """A method with a head over all classes, which `--<method>_labels` names; comes before `Method` among the bases."""

    name: ClassVar[str]
    config: Any
    needs_logits: ClassVar[bool] = True
    replaces_loss: ClassVar[bool] = True
    classifies: ClassVar[bool] = True

    @cached_property
    def classes(self) -> ClassTable:
        """All classes of all tasks."""
        return parse_labels(self.config.labels, f"--{self.name}_labels")

    def required_flags(self) -> Mapping[str, str]:
        """Weight decay would move rows that get no gradient."""
        count = {"num_labels": str(len(self.classes))} if self.config.labels else {}
        return {
            "task_type": "seq_cls",
            "problem_type": "single_label_classification",
            "weight_decay": "0",
            **count,
        }
