"""The format of TRACE: `<task>/{train,eval,test}.json`, a JSON array of `{"prompt", "answer"}`.

The prompt holds the instruction already.
"""

from pathlib import Path

from swift_cl.stream.files import object_row, raw_rows, text_of
from swift_cl.stream.rows import Row, pair


def read(path: Path, limit: int | None = None) -> list[Row]:
    """Read one split of one task."""
    rows = []
    for number, value in enumerate(raw_rows(path)[:limit]):
        where = f"{path}, row {number}"
        raw = object_row(value, where)
        question, answer = text_of(raw, "prompt", where), text_of(raw, "answer", where)
        rows.append(pair(f"{path.parent.name}-{path.stem}-{number}", question, answer))
    return rows
