"""Columns of a LLaMA-Factory data set, as `columns` of its dataset_info.json names them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import field_validator

from swift_cl.errors import UserError
from swift_cl.stream.files import object_row, table_rows
from swift_cl.stream.images import image_files, with_images
from swift_cl.stream.readers._options import Options
from swift_cl.stream.readers.messages import tools_text
from swift_cl.stream.rows import Row, check_unique_ids, row_from_messages

Messages = Callable[[dict[str, Any], str], list[dict[str, Any]]]

# What LLaMA-Factory has and a stage of supervised fine-tuning cannot use.
REFUSED = {
    "chosen": "preference data", "rejected": "preference data", "kto_tag": "preference data", "videos": "videos",
    "audios": "audio",
}  # fmt: skip


class Columns(Options):
    """Columns that both formats have. A row may lack an optional one; a name that no row has is an error."""

    system: str | None = None
    tools: str | None = None
    images: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None
    videos: str | None = None
    audios: str | None = None

    @field_validator(*REFUSED)
    @classmethod
    def _is_not_supported(cls, value: str | None, info: Any) -> None:
        if value is not None:
            raise ValueError(f"{REFUSED[info.field_name]} are not supported, only question and answer with images")


class TableOptions(Options):
    """Settings that both formats have.

    Attributes:
        media_dir: where images are that the data file's folder does not hold, relative to that folder.
        ranking: of dataset_info.json; preference data are refused.
    """

    media_dir: str | None = None
    ranking: bool = False

    @field_validator("ranking")
    @classmethod
    def _no_preferences(cls, value: bool) -> bool:
        if value:
            raise ValueError("preference data are not supported, only question and answer")
        return value


def read_table(
    path: Path, limit: int | None, options: TableOptions, columns: Columns, messages_of: Messages
) -> list[Row]:
    """The rows of a table, numbered from 0.

    Args:
        messages_of: (row, where it stands) -> its dialogue.
    """
    raw_rows = table_rows(path)[:limit]
    check_columns(path, raw_rows, columns)
    rows = []
    for number, value in enumerate(raw_rows):
        where = f"{path}, row {number}"
        raw = object_row(value, where)
        row = row_from_messages(messages_of(raw, where), where, str(raw.get("id", f"{path.stem}-{number}")))
        rows.append(with_extras(row, raw, columns, options.media_dir, path, where))
    return check_unique_ids(path, rows)


def check_columns(path: Path, rows: list[Any], columns: Columns) -> None:
    """Refuse a column that was named explicitly and that no row has: a misspelt name would be ignored otherwise."""
    for field in sorted(columns.model_fields_set):
        name = getattr(columns, field)
        if name is not None and rows and not any(isinstance(row, dict) and name in row for row in rows):
            found = ", ".join(map(str, rows[0])) if isinstance(rows[0], dict) else type(rows[0]).__name__
            raise UserError(f"{path}, row 0: no column {name!r} (columns.{field}), found: {found}")


def optional_text(raw: dict[str, Any], column: str | None, where: str) -> str | None:
    """The text in a column that a row may lack; blank text counts as lacking."""
    value = None if column is None else raw.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is {type(value).__name__}, expected text")
    return value if value.strip() else None


def with_extras(row: Row, raw: dict[str, Any], columns: Columns, media_dir: str | None, path: Path, where: str) -> Row:
    """The row with the system prompt, tools and images of its columns."""
    system = optional_text(raw, columns.system, where)
    tools = tools_text(raw.get(columns.tools), where) if columns.tools else None
    folders = [path.parent, *([path.parent / media_dir] if media_dir else [])]
    images = image_files(raw.get(columns.images), where, folders) if columns.images else ()
    row = replace(row, system=row.system if row.system is not None else system, tools=tools)
    return with_images(row, images, where)
