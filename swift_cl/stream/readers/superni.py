"""SSR's split of Super-NaturalInstructions: `<task>.{train,eval}.json`, JSON lines of
`{"id", "input", "output", "full_prompt", "task_name"}`.

The question is `full_prompt`: the task's definition, an empty line, and the input.
"""

from pathlib import Path

from swift_cl.stream.files import object_row, raw_rows, text_of
from swift_cl.stream.rows import Row, check_unique_ids, pair


def read(path: Path, limit: int | None = None) -> list[Row]:
    """Read one split of one task."""
    rows = []
    for number, value in enumerate(raw_rows(path)[:limit]):
        where = f"{path}, row {number}"
        raw = object_row(value, where)
        question, answer = text_of(raw, "full_prompt", where), text_of(raw, "output", where)
        rows.append(pair(text_of(raw, "id", where), question, answer))
    return check_unique_ids(path, rows)
