"""Read a matrix from a file: results.json, a plain matrix in JSON, or CSV. Every malformed input is one clear line."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.evaluation.metrics import Cell, Matrix
from swift_cl.io import read_json

MISSING = ("", "-", "null", "none")
"""How a CSV cell says that it was not measured."""


@dataclass(frozen=True)
class ScoredMatrix:
    """A matrix and the scorer it came from (None for a bare matrix)."""

    scorer: str | None
    matrix: Matrix
    higher_is_better: bool = True


def read_matrices(path: Path) -> list[ScoredMatrix]:
    """All matrices of a file, one a scorer.

    Raises:
        UserError: the file is missing or malformed; the line names the file, the row and what was found.
    """
    if path.is_dir():
        path = path / "results.json"
    if not path.is_file():
        raise UserError(f"{path}: file not found")
    if path.suffix.lower() == ".csv":
        return [ScoredMatrix(None, _from_csv(path))]
    return matrices(path, read_json(path))


def matrices(path: Path, value: Any) -> list[ScoredMatrix]:
    """All matrices of what a JSON file holds; errors as `read_matrices`."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if "runs" in value:
        raise UserError(f"{path}: holds several runs; pass the results.json of one of them")
    order = value.get("order")
    if not isinstance(order, list) or not order or not all(isinstance(task, str) for task in order):
        raise UserError(f"{path}: 'order' must be a non-empty list of task names, found {order!r}")
    if "scorers" not in value:
        return [ScoredMatrix(None, _matrix(path, "", order, value))]
    scorers = value["scorers"]
    if not isinstance(scorers, dict) or not scorers:
        raise UserError(f"{path}: 'scorers' must be a non-empty object, found {scorers!r}")
    found = []
    for name, entry in scorers.items():
        if not isinstance(entry, dict):
            raise UserError(f"{path}: scorer {name!r} must be an object, found {type(entry).__name__}")
        matrix = _matrix(path, f"scorer {name!r}, ", order, entry)
        found.append(ScoredMatrix(name, matrix, entry.get("higher_is_better", True) is not False))
    return found


def _matrix(path: Path, where: str, order: list[str], value: dict[str, Any]) -> Matrix:
    rows = value.get("matrix")
    if not isinstance(rows, list):
        raise UserError(f"{path}: {where}'matrix' must be a list of rows, found {type(rows).__name__}")
    _check_count(path, where, len(rows), order)
    checked = tuple(_row(path, f"{where}row {number}", row, order) for number, row in enumerate(rows, start=1))
    base = value.get("base")
    return Matrix(tuple(order), checked, None if base is None else _row(path, f"{where}base row", base, order))


def _check_count(path: Path, where: str, count: int, order: list[str]) -> None:
    if count != len(order):
        raise UserError(
            f"{path}: {where}{count} rows for {len(order)} tasks ({', '.join(order)}); expected one row a stage, "
            "null cells for a stage that was not measured"
        )


def _row(path: Path, where: str, row: Any, order: list[str]) -> tuple[Cell, ...]:
    if not isinstance(row, list):
        raise UserError(f"{path}: {where} is {type(row).__name__}, expected a list of {len(order)} cells")
    if len(row) != len(order):
        raise UserError(f"{path}: {where} has {len(row)} cells, expected {len(order)} ({', '.join(order)})")
    for task, cell in zip(order, row, strict=True):
        number = isinstance(cell, int | float) and not isinstance(cell, bool) and math.isfinite(cell)
        if cell is not None and not number:
            raise UserError(f"{path}: {where}, task {task!r}: {cell!r} is not a number or null")
    return tuple(None if cell is None else float(cell) for cell in row)


def _from_csv(path: Path) -> Matrix:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    lines = [[cell.strip() for cell in line] for line in csv.reader(text.splitlines()) if any(c.strip() for c in line)]
    if len(lines) < 2:
        raise UserError(f"{path}: expected a header with the task names and one row a stage")
    header, rows = lines[0], lines[1:]
    # The label column is optional: it is there when every row starts with a word that no cell could be.
    labelled = all(_is_label(row[0]) for row in rows)
    if labelled and len(rows[0]) == len(header):
        header = header[1:]
    if not header or not all(header):
        raise UserError(f"{path}: the header has an empty task name: {lines[0]!r}")
    base: tuple[Cell, ...] | None = None
    found: list[tuple[Cell, ...]] = []
    for number, line in enumerate(rows, start=1):
        label = line[0] if labelled or (line[0].lower() == "base" and len(line) == len(header) + 1) else None
        cells = _row(path, f"row {number}", [_csv_cell(c) for c in (line if label is None else line[1:])], header)
        if label is not None and label.lower() == "base":
            if number != 1:
                raise UserError(f"{path}: row {number} is named base; the base row must be the first")
            base = cells
        else:
            found.append(cells)
    _check_count(path, "", len(found), header)
    return Matrix(tuple(header), tuple(found), base)


def _is_label(text: str) -> bool:
    return text.lower() not in MISSING and isinstance(_csv_cell(text), str)


def _csv_cell(text: str) -> float | str | None:
    """A number, None for a missing cell, or the text itself, which `_row` then refuses by name."""
    if text.lower() in MISSING:
        return None
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text
