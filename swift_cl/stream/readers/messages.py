"""The messages format of Continual-News: a JSON array (or JSON lines) of `{"messages": [...]}`, multi-turn.

A row may carry its own `id`, and a system message at its head that wins over the task's system prompt.
"""

import json
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.stream.rows import Row, check_unique_ids, row_from_messages


def _raw_rows(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        return list(rows)
    rows = []
    for number, line in enumerate(line for line in text.splitlines() if line.strip()):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, row {number}: not valid JSON ({error})") from None
    return rows


def read(path: Path, limit: int | None = None) -> list[Row]:
    """Read a file of dialogues; rows are numbered from 0."""
    rows = []
    for number, raw in enumerate(_raw_rows(path)[:limit]):
        where = f"{path}, row {number}"
        if not isinstance(raw, dict) or "messages" not in raw:
            raise UserError(f"{where}: expected an object with a 'messages' list")
        rows.append(row_from_messages(raw["messages"], where, str(raw.get("id", f"{path.stem}-{number}"))))
    return check_unique_ids(path, rows)
