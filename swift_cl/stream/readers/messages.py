"""The messages format of Continual-News: a JSON array (or JSON lines) of `{"messages": [...]}`, multi-turn.

A row may carry its own `id`, a system message at its head that wins over the task's system prompt, `images` (one name
or a list, relative to the file's folder) and `tools` (JSON text, or a list of descriptions).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.stream.files import first_rows, raw_rows
from swift_cl.stream.images import image_files, with_images
from swift_cl.stream.rows import Row, check_unique_ids, row_from_messages


def tools_text(value: Any, where: str) -> str | None:
    """Descriptions of tools as JSON text; None where there are none."""
    if value is None or value == "" or value == []:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: 'tools' is not valid JSON ({error})") from None
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        raise UserError(f"{where}: 'tools' is {type(parsed).__name__}, expected a list of descriptions")
    return text if parsed else None


def read(path: Path, limit: int | None = None) -> list[Row]:
    """Read a file of dialogues; rows are numbered from 0."""
    return check_unique_ids(path, [_row(raw, path, number) for number, raw in enumerate(raw_rows(path)[:limit])])


def check_head(path: Path, count: int) -> list[Row]:
    """The first rows of a JSON lines file that is streamed: checked as `read` checks them, the rest is not looked at.

    Raises:
        UserError: a row is wrong, there is none, or one has images (whose names ms-swift takes from the working
            directory, and nothing that is streamed is rewritten).
    """
    rows = check_unique_ids(path, [_row(raw, path, number) for number, raw in enumerate(first_rows(path, count))])
    if not rows:
        raise UserError(f"{path}: the data file has no rows")
    for number, row in enumerate(rows):
        if row.images:
            raise UserError(f"{path}, row {number}: has images, which cannot be streamed")
    return rows


def _row(raw: Any, path: Path, number: int) -> Row:
    where = f"{path}, row {number}"
    if not isinstance(raw, dict) or "messages" not in raw:
        raise UserError(f"{where}: expected an object with a 'messages' list")
    row = row_from_messages(raw["messages"], where, str(raw.get("id", f"{path.stem}-{number}")))
    images = image_files(raw.get("images", raw.get("image")), where, [path.parent])
    return with_images(replace(row, tools=tools_text(raw.get("tools"), where)), images, where)
