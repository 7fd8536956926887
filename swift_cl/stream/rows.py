"""The one in-memory form of a sample: a dialogue with an id."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.io import sha256_json

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One dialogue.

    Attributes:
        id: unique within its file; taken from the file, or `<stem>-<number>` counted from 0.
        messages: `{"role", "content"}` in order; user and assistant alternate, the last one is the assistant's.
        system: the row's own system prompt, or None where the row has none (the task's then applies).
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    system: str | None = None

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(question, reference answer) of every turn."""
        return [(self.messages[i]["content"], self.messages[i + 1]["content"]) for i in range(0, len(self.messages), 2)]

    @property
    def content_hash(self) -> str:
        """Hash of what the row says, without its id."""
        return sha256_json([self.system, [dict(m) for m in self.messages]])

    def as_training_row(self, system: str | None) -> dict[str, Any]:
        """The row in ms-swift's messages format, its system prompt (or else `system`) as the first message."""
        prompt = self.system if self.system is not None else system
        head = [] if prompt is None else [{"role": "system", "content": prompt}]
        return {"messages": head + [dict(m) for m in self.messages]}


def row_from_messages(messages: Any, where: str, row_id: str) -> Row:
    """Check a `messages` list and make a `Row` of it.

    Args:
        where: how an error names the row, e.g. `2022-train.json, row 3`.

    Raises:
        UserError: the list is not a dialogue of user and assistant turns that ends with the assistant's.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' is {type(messages).__name__}, expected a non-empty list")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}: message {position} has no text 'content'")
        if message.get("role") not in ROLES:
            raise UserError(
                f"{where}: message {position} has role {message.get('role')!r}, allowed: {', '.join(ROLES)}"
            )
    system = None
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if not any(m["role"] == "assistant" for m in messages):
        raise UserError(f"{where}: no assistant turn, so there is nothing to learn or to score")
    for position, message in enumerate(messages):
        expected = "user" if position % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise UserError(
                f"{where}: turn {position} is of role {message['role']!r}, expected {expected!r} "
                "(user and assistant alternate)"
            )
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is the user's, expected the assistant's answer to it")
    return Row(row_id, tuple({"role": m["role"], "content": m["content"]} for m in messages), system)


def check_unique_ids(path: Path, rows: list[Row]) -> list[Row]:
    """Refuse a file with the same id twice: answers are paired with references by id."""
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row.id in seen:
            raise UserError(f"{path}, row {number}: id {row.id!r} was used by row {seen[row.id]} already")
        seen[row.id] = number
    return rows
