"""Images of a row: found on disk, and marked in the text where they stand."""

import mimetypes
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.stream.rows import Row

MARK = "<image>"
ELSEWHERE = ("http://", "https://", "data:")


def image_files(value: Any, where: str, folders: Sequence[Path]) -> tuple[str, ...]:
    """The images that a row names, as absolute paths; URLs stay as they are.

    Args:
        value: one name or a list of names, None for none.
        folders: where a relative name is looked for, in this order: the folder of the data file first.

    Raises:
        UserError: an image is missing, its name is no text, or a relative name leaves the folders.
    """
    if value is None:
        return ()
    names = value if isinstance(value, list) else [value]
    return tuple(_find(name, f"{where}: image {number}", folders) for number, name in enumerate(names))


def _find(name: Any, where: str, folders: Sequence[Path]) -> str:
    if not isinstance(name, str) or not name:
        raise UserError(f"{where} is {type(name).__name__}, expected the name of a file")
    if name.startswith(ELSEWHERE):
        return name
    if Path(name).is_absolute():
        candidates = [Path(name)]
    elif Path(os.path.normpath(name)).parts[0] == "..":
        raise UserError(f"{where}, {name}, lies outside the data folder")
    else:
        candidates = [folder.resolve() / name for folder in folders]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        looked = ", ".join(dict.fromkeys(os.path.normpath(path.parent) for path in candidates))
        raise UserError(f"{where}, {name}, was not found (looked in {looked})")
    return os.path.normpath(found)


def image_kind(name: str) -> str | None:
    """The media type that a file's name tells, e.g. `image/png`; None where it tells none of an image."""
    kind, _ = mimetypes.guess_type(name)
    return kind if kind is not None and kind.startswith("image/") else None


def check_askable(path: Path, rows: list[Row]) -> list[Row]:
    """Refuse test rows that the evaluator would ask otherwise than they were meant."""
    for row in rows:
        where = f"{path}, id {row.id!r}"
        if row.tools is not None:
            raise UserError(f"{where}: has tools, which the evaluator does not send")
        if row.images and any(MARK in answer for _, answer in row.turns):
            raise UserError(f"{where}: an image stands in an answer, but only questions can be asked with images")
        for name in row.images:
            if not name.startswith(ELSEWHERE) and image_kind(name) is None:
                raise UserError(f"{where}: {name} is not named like an image (.png, .jpg, .webp, ...)")
    return rows


def with_images(row: Row, images: tuple[str, ...], where: str) -> Row:
    """The row with its images; a row without a mark gets all of them at the head of its first question.

    Raises:
        UserError: the text marks another number of images than there are.
    """
    marks = sum(message["content"].count(MARK) for message in row.messages)
    if images and marks == 0:
        first = {**row.messages[0], "content": MARK * len(images) + row.messages[0]["content"]}
        return replace(row, messages=(first, *row.messages[1:]), images=images)
    if images and marks != len(images):
        raise UserError(f"{where}: the text has {marks} {MARK} marks for {len(images)} images")
    return replace(row, images=images)
