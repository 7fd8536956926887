"""One file a format. A reader is `read(path, limit) -> list[Row]`; formats are looked up by module name."""

import importlib
import pkgutil
from pathlib import Path

from swift_cl.errors import UserError, did_you_mean
from swift_cl.stream.rows import Row


def formats() -> list[str]:
    """Names of the formats that can be read."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def read_rows(path: Path, file_format: str = "messages", limit: int | None = None) -> list[Row]:
    """Read a data file.

    Args:
        path: the file.
        file_format: one of `formats()`.
        limit: only the first so many rows; None for all.

    Raises:
        UserError: unknown format; missing, empty or malformed file (the row is named).
    """
    if file_format not in formats():
        hint = did_you_mean(file_format, formats())
        raise UserError(f"format {file_format!r} is unknown, allowed: {', '.join(formats())}{hint}")
    if not path.is_file():
        raise UserError(f"{path}: data file not found")
    reader = importlib.import_module(f"{__name__}.{file_format}")
    rows: list[Row] = reader.read(path, limit)
    if not rows:
        raise UserError(f"{path}: the data file has no rows")
    return rows
