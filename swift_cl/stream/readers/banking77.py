"""Banking77: train.csv and test.csv with the columns `text` and `category`, and categories.json beside them, the list
whose order groups the categories into tasks.
"""

from pathlib import Path

from swift_cl.errors import UserError
from swift_cl.io import read_json
from swift_cl.stream.files import object_row, table_rows, text_of
from swift_cl.stream.readers._classes import ClassOptions, class_rows
from swift_cl.stream.rows import Row

LABELS = "categories.json"
Options = ClassOptions


def files(path: Path, options: ClassOptions) -> list[Path]:
    """The file, and the order of the categories."""
    return [path, path.parent / LABELS]


def read(path: Path, limit: int | None = None, options: ClassOptions | None = None) -> list[Row]:
    """Read one split of one task."""
    classes = read_json(path.parent / LABELS)
    if not isinstance(classes, list) or not all(isinstance(label, str) for label in classes):
        raise UserError(f"{path.parent / LABELS}: expected a list of categories")
    samples = []
    for number, value in enumerate(table_rows(path)):
        where = f"{path}, row {number}"
        raw = object_row(value, where)
        samples.append((where, text_of(raw, "text", where), text_of(raw, "category", where)))
    return class_rows(path, samples, classes, options or ClassOptions())[:limit]
