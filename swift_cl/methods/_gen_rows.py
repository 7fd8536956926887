"""Rows that teach a model to generate its own training rows: `__gen__:<task>` -> question, separator, answer (LAMOL).

All separators are plain text of existing tokens: no new vocabulary, so the adapter is served like any other.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swift_cl.errors import UserError
from swift_cl.generation.engine import Prompt
from swift_cl.generation.screen import Rejected, Turns, closed_labels
from swift_cl.methods.base import TrainingRow

GEN, ANSWER, USER, SYSTEM = "__gen__", "\n__ans__\n", "\n__user__\n", "__sys__\n"
SEPARATORS = (SYSTEM, USER, ANSWER)
MARKS = ("__gen__", "__ans__", "__user__", "__sys__")
_TASK = re.compile(r"[A-Za-z0-9_.-]+")


def check_task_name(method: str, task: str) -> None:
    """Refuse a name that cannot stand in a generation prompt."""
    if not _TASK.fullmatch(task):
        raise UserError(
            f"--cl_task is {task!r}, but method '{method}' writes it into prompts, allowed: letters, digits, _ . -"
        )


@dataclass(frozen=True)
class TaskMeta:
    """What is kept of a task for its generated rows.

    Attributes:
        system: the system prompt of all its rows, None where they have several: then it is generated too.
        labels: the closed set of answers, None where there is none.
    """

    task: str
    rows: int
    system: str | None
    labels: list[str] | None

    @classmethod
    def of(cls, task: str, rows: Sequence[TrainingRow]) -> "TaskMeta":
        """Describe a task."""
        systems = {row["messages"][0]["content"] for row in rows}
        labels = closed_labels([str(row["messages"][-1]["content"]) for row in rows])
        return cls(task, len(rows), systems.pop() if len(systems) == 1 else None, labels)

    def to_json(self) -> dict[str, Any]:
        """What a method's state keeps."""
        return dict(vars(self))


@dataclass(frozen=True)
class GenRows:
    """How rows of a task are written as text and read back.

    Attributes:
        task: its name in the prompt; None for one prompt that all tasks share.
        system: put back into rows; None where the text holds it.
    """

    task: str | None
    system: str | None

    @property
    def prompt(self) -> Prompt:
        """What the model is asked; the system prompt is given as empty, or the template would add its default."""
        return Prompt.chat("", GEN if self.task is None else f"{GEN}:{self.task}")

    def text(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """A row as text; None where reading it back would not give the row."""
        if any(mark in message["content"] for message in messages for mark in MARKS):
            return None
        head = "" if self.system is not None else f"{SYSTEM}{messages[0]['content']}{USER}"
        turns = [dict(message) for message in messages[1:]]
        text = head + "".join(
            (USER if number and turn["role"] == "user" else ANSWER if turn["role"] == "assistant" else "")
            + turn["content"]
            for number, turn in enumerate(turns)
        )
        try:
            read = self.parse(text)
        except Rejected:
            return None
        wanted = [{"role": m["role"], "content": m["content"]} for m in messages]
        return text if self.row(read)["messages"] == wanted else None

    def parse(self, text: str) -> Turns:
        """The turns in a text, byte for byte; with the system prompt as first one where the text holds it."""
        found: Turns = []
        if self.system is None:
            head, cut, text = text.partition(USER)
            if not cut or not head.startswith(SYSTEM):
                raise Rejected("separators")
            found.append({"role": "system", "content": head[len(SYSTEM) :]})
        for exchange in text.split(USER):
            parts = exchange.split(ANSWER)
            if len(parts) != 2:
                raise Rejected("separators")
            found += [{"role": "user", "content": parts[0]}, {"role": "assistant", "content": parts[1]}]
        return found

    def row(self, turns: Turns) -> TrainingRow:
        """The training row of parsed turns."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {"messages": [*head, *turns]}

    def gen_row(self, messages: Sequence[Mapping[str, str]]) -> TrainingRow | None:
        """The row that teaches to generate this one; None where it cannot be written as text."""
        text = self.text(messages)
        if text is None:
            return None
        return {"messages": [*map(dict, self.prompt.messages), {"role": "assistant", "content": text}]}
