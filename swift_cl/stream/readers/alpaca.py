"""The alpaca format of LLaMA-Factory and EasyCL: `{"instruction", "input", "output"}`, one question and answer a row.

The question is the instruction and, on the next line, the input where there is one. `columns` names other columns, as
in dataset_info.json. Without it, the columns `system`, `history`, `tools` and `images` are used where rows have them.
"""

from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.stream.files import text_of
from swift_cl.stream.readers._columns import Columns, TableOptions, optional_text, read_table
from swift_cl.stream.readers._options import INPUT, Prompt, fill
from swift_cl.stream.rows import Row


class AlpacaColumns(Columns):
    """Columns of this format; those that stay None are not read."""

    prompt: str = "instruction"
    response: str = "output"
    query: str | None = None
    history: str | None = None


USUAL = AlpacaColumns.model_construct(
    query="input", history="history", system="system", tools="tools", images="images", _fields_set=set()
)


class Options(TableOptions):
    """Settings.

    Attributes:
        columns: names of the columns; see `USUAL`.
        template: the question, with {input} where the text of the row goes.
    """

    columns: AlpacaColumns = USUAL
    template: Prompt = INPUT


def read(path: Path, limit: int | None = None, options: Options | None = None) -> list[Row]:
    """Read a JSON, JSON lines, CSV or Parquet file; rows are numbered from 0."""
    options = options or Options()
    columns = options.columns

    def dialogue(raw: dict[str, Any], where: str) -> list[dict[str, Any]]:
        instruction = text_of(raw, columns.prompt, where, empty=True)
        query = optional_text(raw, columns.query, where)
        text = "\n".join(part for part in (instruction, query) if part)
        if not text.strip():
            raise UserError(f"{where}: the question is empty ({columns.prompt!r} and {columns.query!r})")
        messages = [*_history(raw, columns.history, where), fill(options.template, text)]
        messages.append(text_of(raw, columns.response, where))
        return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(messages)]

    return read_table(path, limit, options, columns, dialogue)


def _history(raw: dict[str, Any], column: str | None, where: str) -> list[str]:
    """Earlier questions and answers, one after the other."""
    turns = raw.get(column) if column else None
    if not turns:
        return []
    if not isinstance(turns, list):
        raise UserError(f"{where}: {column!r} is {type(turns).__name__}, expected a list of [question, answer]")
    found: list[str] = []
    for position, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise UserError(f"{where}: turn {position} of {column!r} is not a [question, answer] of text")
        found += turn
    return found
