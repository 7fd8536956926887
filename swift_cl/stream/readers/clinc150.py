"""CLINC150: data_full.json, `{"train": [[sentence, intent], ...], "val": ..., "test": ...}`, and label_dict.json beside
it, `{intent: number}`, whose order groups the intents into tasks. Out-of-scope splits are not read.
"""

from pathlib import Path
from typing import Literal

from swift_cl.errors import UserError
from swift_cl.stream.files import json_object
from swift_cl.stream.readers._classes import ClassOptions, class_rows
from swift_cl.stream.rows import Row

LABELS = "label_dict.json"


class Options(ClassOptions):
    """Settings: the split, beside those of every classification task."""

    split: Literal["train", "val", "test"] = "train"


def files(path: Path, options: Options) -> list[Path]:
    """The file, and the order of the intents."""
    return [path, path.parent / LABELS]


def read(path: Path, limit: int | None = None, options: Options | None = None) -> list[Row]:
    """Read one split of one task."""
    options = options or Options()
    splits, numbers = json_object(path), json_object(path.parent / LABELS)
    if sorted(numbers.values(), key=str) != sorted(range(len(numbers)), key=str):
        raise UserError(f"{path.parent / LABELS}: expected each intent with its number, counted from 0 without gaps")
    if not isinstance(splits.get(options.split), list):
        raise UserError(f"{path}: no list of the split {options.split!r}, found: {', '.join(splits) or 'none'}")
    samples = []
    for number, sample in enumerate(splits[options.split]):
        where = f"{path}, row {number} of {options.split}"
        if not isinstance(sample, list) or len(sample) != 2 or not all(isinstance(s, str) and s for s in sample):
            raise UserError(f"{where}: expected [sentence, intent]")
        samples.append((where, sample[0], sample[1]))
    rows = class_rows(path, samples, sorted(numbers, key=lambda label: int(numbers[label])), options)
    return rows[:limit]
