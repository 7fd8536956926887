"""ZsRE in MEND's form: a JSON array of `{"src", "rephrase", "alt", "loc", "loc_ans", ...}`, one knowledge edit a row.

The edit is learned from `src` -> `alt`. It is asked by `rephrase` (generalisation), or by `src` again (edit success); a
question that the edit must not touch is `loc` with its answer `loc_ans` (locality).
"""

from pathlib import Path
from typing import Literal

from swift_cl.stream.files import object_row, raw_rows, text_of
from swift_cl.stream.readers._options import INPUT, Prompt, ShareOptions, fill
from swift_cl.stream.rows import Row, pair

COLUMNS = {"edit": ("src", "alt"), "rephrase": ("rephrase", "alt"), "locality": ("loc", "loc_ans")}


class Options(ShareOptions):
    """Settings: a task's share of the edits, in the order of the file; which question; and how it is put."""

    split: Literal["edit", "rephrase", "locality"] = "edit"
    prompt: Prompt = INPUT


def read(path: Path, limit: int | None = None, options: Options | None = None) -> list[Row]:
    """Read one task's share of the edits."""
    options = options or Options()
    question_column, answer_column = COLUMNS[options.split]
    values = raw_rows(path)
    rows = []
    for number in options.share(len(values)):
        where = f"{path}, row {number}"
        raw = object_row(values[number], where)
        question, answer = text_of(raw, question_column, where), text_of(raw, answer_column, where)
        if options.split == "locality" and not question.endswith("?"):
            question += "?"
        rows.append(pair(f"{path.stem}-{options.split}-{number}", fill(options.prompt, question), answer))
    return rows[:limit]
