"""The one in-memory form of a sample: a dialogue with an id."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.io import sha256_json

# ms-swift's names. A tool's result stands where a question stands, the call of a tool where an answer stands.
QUESTION_ROLES = ("user", "tool_response")
ANSWER_ROLES = ("assistant", "tool_call")
ROLES = ("system", "user", "assistant", "tool_call", "tool_response")


@dataclass(frozen=True)
class Row:
    """One dialogue.

    Attributes:
        id: unique within its file; taken from the file, or `<stem>-<number>` counted from 0.
        messages: `{"role", "content"}` in order; questions and answers alternate, the last one is an answer.
        system: the row's own system prompt, or None where the row has none (the task's then applies).
        images: files or URLs, in the order of the `<image>` marks in the messages.
        tools: descriptions of the tools that may be called, as JSON text; None for none.
        labels: the answers that are allowed; empty where any text is. Not part of what the row says.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    system: str | None = None
    images: tuple[str, ...] = ()
    tools: str | None = None
    labels: tuple[str, ...] = ()

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(question, reference answer) of every turn."""
        return [(self.messages[i]["content"], self.messages[i + 1]["content"]) for i in range(0, len(self.messages), 2)]

    @property
    def content_hash(self) -> str:
        """Hash of what the row says, without its id."""
        said: list[Any] = [self.system, [dict(m) for m in self.messages]]
        return sha256_json([*said, self._extras()] if self._extras() else said)

    def as_training_row(self, system: str | None) -> dict[str, Any]:
        """The row in ms-swift's messages format, its system prompt (or else `system`) as the first message."""
        prompt = self.system if self.system is not None else system
        head = [] if prompt is None else [{"role": "system", "content": prompt}]
        return {"messages": head + [dict(m) for m in self.messages], **self._extras()}

    def _extras(self) -> dict[str, Any]:
        """What a row of plain text does not have, under ms-swift's names."""
        extras: dict[str, Any] = {}
        if self.images:
            extras["images"] = list(self.images)
        if self.tools is not None:
            extras["tools"] = self.tools
        return extras


def pair(row_id: str, question: str, answer: str, system: str | None = None, labels: Sequence[str] = ()) -> Row:
    """A row of one question and its answer."""
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Row(row_id, messages, system, labels=tuple(labels))


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
    if not any(m["role"] in ANSWER_ROLES for m in messages):
        raise UserError(f"{where}: no assistant turn, so there is nothing to learn or to score")
    for position, message in enumerate(messages):
        expected = QUESTION_ROLES if position % 2 == 0 else ANSWER_ROLES
        if message["role"] not in expected:
            raise UserError(
                f"{where}: turn {position} is of role {message['role']!r}, expected {expected[0]!r} "
                "(user and assistant alternate)"
            )
    if messages[-1]["role"] not in ANSWER_ROLES:
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
