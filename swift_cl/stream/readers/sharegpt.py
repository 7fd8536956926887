"""The sharegpt format of LLaMA-Factory and EasyCL: `{"conversations": [{"from": "human", "value": ...}, ...]}`.

`columns` and `tags` name other columns, keys and speakers, as in dataset_info.json. Without `columns`, the columns
`system`, `tools` and `images` are used where rows have them.
"""

from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.stream.readers._columns import Columns, TableOptions, read_table
from swift_cl.stream.readers._options import Options as _Options
from swift_cl.stream.rows import Row


class SharegptColumns(Columns):
    """Columns of this format; those that stay None are not read."""

    messages: str = "conversations"


class Tags(_Options):
    """Keys of a turn, and the names of the speakers."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"

    @property
    def roles(self) -> dict[str, str]:
        """ms-swift's role for each speaker."""
        return {
            self.user_tag: "user",
            self.assistant_tag: "assistant",
            self.observation_tag: "tool_response",
            self.function_tag: "tool_call",
            self.system_tag: "system",
        }


USUAL = SharegptColumns.model_construct(system="system", tools="tools", images="images", _fields_set=set())


class Options(TableOptions):
    """Settings: names of columns and of speakers."""

    columns: SharegptColumns = USUAL
    tags: Tags = Tags()


def read(path: Path, limit: int | None = None, options: Options | None = None) -> list[Row]:
    """Read a JSON, JSON lines or Parquet file; rows are numbered from 0."""
    options = options or Options()
    columns, tags = options.columns, options.tags

    def dialogue(raw: dict[str, Any], where: str) -> list[dict[str, Any]]:
        if columns.messages not in raw:
            raise UserError(f"{where}: no column {columns.messages!r}, found: {', '.join(raw) or 'none'}")
        return _messages(raw[columns.messages], columns.messages, tags, where)

    return read_table(path, limit, options, columns, dialogue)


def _messages(turns: Any, column: str, tags: Tags, where: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: {column!r} is {type(turns).__name__}, expected a non-empty list")
    messages = []
    for position, turn in enumerate(turns):
        speaker = turn.get(tags.role_tag) if isinstance(turn, dict) else None
        if speaker not in tags.roles:
            raise UserError(
                f"{where}: turn {position} has {tags.role_tag!r} {speaker!r}, allowed: {', '.join(tags.roles)}"
            )
        if not isinstance(turn.get(tags.content_tag), str):
            raise UserError(f"{where}: turn {position} has no text {tags.content_tag!r}")
        messages.append({"role": tags.roles[speaker], "content": turn[tags.content_tag]})
    return messages
