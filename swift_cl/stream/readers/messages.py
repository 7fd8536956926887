"""The messages format of Continual-News: a JSON array (or JSON lines) of `{"messages": [...]}`, multi-turn.

A row may carry its own `id`, and a system message at its head that wins over the task's system prompt.
"""

import json
import re
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.io import read_text
from swift_cl.stream.rows import Row, check_unique_ids, row_from_messages


def raw_rows(path: Path) -> list[Any]:
    """The JSON values of an array or of JSON lines; malformed JSON is an error that names the row."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, row {_rows_before(text)}: not valid JSON ({error})") from None
        return list(rows)
    rows = []
    # Not splitlines(): it also cuts at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(line for line in text.split("\n") if line.strip()):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, row {number}: not valid JSON ({error})") from None
    return rows


def _rows_before(text: str) -> int:
    """How many whole rows a malformed JSON array has before the place that is wrong."""
    decoder, position, count = json.JSONDecoder(), text.index("[") + 1, 0
    separator = re.compile(r"[\s,]*")
    while True:
        found = separator.match(text, position)
        try:
            _, position = decoder.raw_decode(text, found.end() if found else position)
        except json.JSONDecodeError:
            return count
        count += 1


def read(path: Path, limit: int | None = None) -> list[Row]:
    """Read a file of dialogues; rows are numbered from 0."""
    rows = []
    for number, raw in enumerate(raw_rows(path)[:limit]):
        where = f"{path}, row {number}"
        if not isinstance(raw, dict) or "messages" not in raw:
            raise UserError(f"{where}: expected an object with a 'messages' list")
        rows.append(row_from_messages(raw["messages"], where, str(raw.get("id", f"{path.stem}-{number}"))))
    return check_unique_ids(path, rows)
