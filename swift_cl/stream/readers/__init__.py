"""One file a format. Formats are looked up by module name; a module defines

read(path, limit) -> list[Row]            or read(path, limit, options) when it has settings
Options                                    its settings, a model of `_options`; a format without it has none
files(path, options) -> list[Path]         what must be on disk; by default the data file alone
locate(root, text) -> Path                 where a benchmark's `train` or `test` is; by default `root / text`

Each reader checks what it reads: an error names the file and the row, what was found, and what is allowed.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from swift_cl.errors import UserError, did_you_mean
from swift_cl.stream.rows import Row


def formats() -> list[str]:
    """Names of the formats that can be read."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def _reader(file_format: str) -> ModuleType:
    if file_format not in formats():
        hint = did_you_mean(file_format, formats())
        raise UserError(f"format {file_format!r} is unknown, allowed: {', '.join(formats())}{hint}")
    return importlib.import_module(f"{__name__}.{file_format}")


def parse_options(file_format: str, options: Mapping[str, Any]) -> Any:
    """The settings of a format as its `Options`; None for a format without settings.

    Raises:
        UserError: unknown format, unknown key or wrong value, named in one line.
    """
    reader = _reader(file_format)
    if not hasattr(reader, "Options"):
        if options:
            raise UserError(f"format {file_format!r} has no options, found: {', '.join(options)}")
        return None
    try:
        return reader.Options.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            known = list(reader.Options.model_fields)
            key = ".".join(map(str, first["loc"]))
            hint = did_you_mean(key, known)
            raise UserError(
                f"options of format {file_format!r}: {key!r} is unknown, allowed: {', '.join(known)}{hint}"
            ) from None
        key = ".".join(map(str, first["loc"]))
        found = "" if first["type"] == "missing" or not key else f", found {first.get('input')!r}"
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"options of format {file_format!r}: {f'{key}: ' if key else ''}{said}{found}") from None


def locate(root: Path, text: str, file_format: str) -> Path:
    """Where the data is that a benchmark file names."""
    reader = _reader(file_format)
    found: Path = reader.locate(root, text) if hasattr(reader, "locate") else root / text
    return found


def needed_files(path: Path, file_format: str, options: Mapping[str, Any]) -> list[Path]:
    """What must be on disk before `path` can be read."""
    reader, parsed = _reader(file_format), parse_options(file_format, options)
    found: list[Path] = reader.files(path, parsed) if hasattr(reader, "files") else [path]
    return found


def read_rows(
    path: Path, file_format: str = "messages", limit: int | None = None, options: Mapping[str, Any] | None = None
) -> list[Row]:
    """Read a data file.

    Args:
        path: the file.
        file_format: one of `formats()`.
        limit: only the first so many rows; None for all.
        options: settings of the format.

    Raises:
        UserError: unknown format or option; missing, empty or malformed file (the row is named).
    """
    for file in needed_files(path, file_format, options or {}):
        if not file.exists() or (file.is_dir() and file == path):
            raise UserError(f"{file}: data file not found")
    parsed = parse_options(file_format, options or {})
    reader = _reader(file_format)
    rows: list[Row] = reader.read(path, limit) if parsed is None else reader.read(path, limit, parsed)
    if not rows:
        raise UserError(f"{path}: the data file has no rows")
    return rows
