"""What a pydantic model refuses, as one line: the key with its place in the file, what is allowed, what was meant."""

import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from swift_cl.errors import UserError, did_you_mean


def explain(path: Path, error: ValidationError, model: type[BaseModel], values: Any) -> UserError:
    """The first problem of a validation as one line.

    Args:
        model: what the file was checked against; its keys are the ones that may have been meant.
        values: the content of the file.
    """
    errors = error.errors()
    # Of a value that fits no member of a union, the member that got farthest says most.
    first = max((e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]), key=lambda e: _depth(e["loc"], values))
    unknown = first["type"] == "extra_forbidden"
    missing = first["type"] == "missing"
    location = _in_file(first["loc"], values, keep_last=missing)
    key = ".".join(map(str, location)) or "the file"
    if unknown:
        known = _keys_at(model, location[:-1])
        hint = did_you_mean(str(location[-1]), known)
        return UserError(f"{path}: {key} is unknown, allowed: {', '.join(known)}{hint}")
    found = "" if missing else f", found {first.get('input')!r}"
    return UserError(f"{path}: {key}: {first['msg']}{found}")


def _in_file(location: tuple[int | str, ...], values: Any, keep_last: bool) -> list[int | str]:
    """The parts of pydantic's location that are keys or positions of the file; it also names members of unions."""
    kept: list[int | str] = []
    for number, part in enumerate(location):
        inside = isinstance(values, dict) and part in values
        inside |= isinstance(values, list) and isinstance(part, int) and part < len(values)
        if inside:
            values = values[part]
        if inside or (keep_last and number == len(location) - 1):
            kept.append(part)
    return kept


def _depth(location: tuple[int | str, ...], values: Any) -> int:
    return len(_in_file(location, values, keep_last=False))


def _keys_at(model: type[BaseModel], location: list[int | str]) -> list[str]:
    """The keys that a model allows at a place."""
    annotation: Any = model
    for part in location:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[str(part)].annotation
        else:
            annotation = typing.get_args(annotation)[-1]  # the items of a list, the values of a mapping
        if isinstance(annotation, types.UnionType):
            annotation = next(entry for entry in typing.get_args(annotation) if entry is not type(None))
    return list(annotation.model_fields)
