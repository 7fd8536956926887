"""continual_data.json of the incremental-learning codebase: all tasks and splits in one file, as parallel lists,
`{"0": {"train": {"input": [...], "target": [...], ...}, "dev": ..., "test": ...}, "1": ...}`, and
continual_config.json beside it, which names the classes of each task (none in a data set without classes).
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from swift_cl.errors import UserError
from swift_cl.stream.files import json_object
from swift_cl.stream.readers._classes import CLASSIFY
from swift_cl.stream.readers._options import Options as _Options
from swift_cl.stream.readers._options import Prompt, fill
from swift_cl.stream.rows import Row, pair

CONFIG = "continual_config.json"


class Options(_Options):
    """Settings: the task, counted from 0; the split; and how an input is put."""

    task: int = Field(default=0, ge=0)
    split: Literal["train", "dev", "test"] = "train"
    prompt: Prompt = CLASSIFY


def files(path: Path, options: Options) -> list[Path]:
    """The file, and the classes of its tasks."""
    return [path, path.parent / CONFIG]


def read(path: Path, limit: int | None = None, options: Options | None = None) -> list[Row]:
    """Read one split of one task."""
    options = options or Options()
    tasks = json_object(path)
    task = tasks.get(str(options.task))
    if not isinstance(task, dict):
        raise UserError(f"{path}: no task {options.task}, found: {', '.join(tasks) or 'none'}")
    split = task.get(options.split)
    where = f"{path}, task {options.task}, {options.split}"
    if not isinstance(split, dict):
        raise UserError(f"{where}: no such split, found: {', '.join(task) or 'none'}")
    inputs, targets = _column(split, "input", where), _column(split, "target", where)
    if len(inputs) != len(targets):
        raise UserError(f"{where}: {len(inputs)} inputs for {len(targets)} targets")
    labels = classes_of(path.parent / CONFIG, options.task)
    rows = []
    for number, (text, target) in enumerate(zip(inputs, targets, strict=True)):
        for name, value in (("input", text), ("target", target)):
            if not isinstance(value, str):
                raise UserError(
                    f"{where}, row {number}: {name!r} is {type(value).__name__}, expected text (labels of single "
                    "words, as for named entities, are not supported)"
                )
            if not value.strip():
                raise UserError(f"{where}, row {number}: {name!r} is empty")
        question = fill(options.prompt, text)
        rows.append(pair(f"{options.task}-{options.split}-{number}", question, target, labels=labels))
    return rows[:limit]


def _column(split: dict[str, Any], name: str, where: str) -> list[Any]:
    if not isinstance(split.get(name), list):
        raise UserError(f"{where}: no list {name!r}, found: {', '.join(split) or 'none'}")
    return list(split[name])


def classes_of(file: Path, task: int) -> list[str]:
    """Names of a task's classes; empty for a data set without classes."""
    config = json_object(file)
    names, groups = config.get("idx2label"), config.get("CUR_CLASS")
    if not names or not groups:
        return []
    try:
        return [str(names[index]) for index in groups[task]]
    except (LookupError, TypeError):
        raise UserError(f"{file}: CUR_CLASS and idx2label do not name the classes of task {task}") from None
