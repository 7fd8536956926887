"""Data files as raw rows: JSON arrays, JSON lines, CSV, TSV and Parquet. What a row means is its reader's business."""

import codecs
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.io import read_text

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def table_rows(path: Path) -> list[Any]:
    """The rows of a table, by suffix: objects of a JSON file, or one `{column: value}` a line of a CSV, TSV or Parquet.

    Raises:
        UserError: the file is missing or malformed (the row is named), or its suffix is of another kind.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: suffix {path.suffix!r} is unknown, allowed: {', '.join(SUFFIXES)}")
    if path.suffix in (".csv", ".tsv"):
        return _csv_rows(path)
    return _parquet_rows(path) if path.suffix == ".parquet" else raw_rows(path)


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


def first_rows(path: Path, count: int) -> list[Any]:
    """The first values of a JSON lines file, without reading on.

    Raises:
        UserError: the file is missing, begins with a byte order mark or an array, or one of these lines is malformed.
    """
    if not path.is_file():
        raise UserError(f"{path}: data file not found")
    if starts_with_mark(path):
        raise UserError(f"{path}: begins with a byte order mark; save it as UTF-8 without one")
    rows: list[Any] = []
    with path.open("rb") as stream:
        for line in stream:
            if len(rows) == count:
                break
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:  # malformed JSON, or not UTF-8
                    raise UserError(f"{path}, row {len(rows)}: not valid JSON ({error})") from None
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


def csv_lines(path: Path) -> list[list[str]]:
    """The cells of a CSV (or TSV) file without a header, line by line; blank lines are left out."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    lines: list[list[str]] = []
    try:
        for line in csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True):
            if line:
                lines.append(line)
    except csv.Error as error:
        raise UserError(f"{path}, line {len(lines)}: not valid CSV ({error})") from None
    return lines


def _csv_rows(path: Path) -> list[Any]:
    lines = csv_lines(path)
    header = lines[0] if lines else []
    for number, line in enumerate(lines[1:]):
        if len(line) != len(header):
            raise UserError(f"{path}, row {number}: {len(line)} cells, but the header has {len(header)} columns")
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def _parquet_rows(path: Path) -> list[Any]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_table

    try:
        return list(read_table(path).to_pylist())
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object."""
    from swift_cl.io import read_json

    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def object_row(raw: Any, where: str) -> dict[str, Any]:
    """A raw row, checked to be an object."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(raw).__name__}")
    return raw


def text_of(raw: dict[str, Any], column: str, where: str, *, empty: bool = False) -> str:
    """The text in a column; a missing column, another type, or (unless `empty`) blank text is an error."""
    if column not in raw:
        raise UserError(f"{where}: no column {column!r}, found: {', '.join(map(str, raw)) or 'none'}")
    value = raw[column]
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is {type(value).__name__}, expected text")
    if not empty and not value.strip():
        raise UserError(f"{where}: {column!r} is empty")
    return value


def starts_with_mark(path: Path) -> bool:
    """Whether a file begins with a byte order mark, which we skip and ms-swift's loader stumbles over."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def mentions_images(path: Path) -> bool:
    """Whether a JSON file has a key `image` or `images` somewhere; read in blocks, whatever its size."""
    if not path.is_file():
        return False
    rest = b""
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            if re.search(rb'"images?"\s*:', rest + block):
                return True
            rest = block[-64:]
    return False
