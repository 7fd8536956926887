"""AG News, DBpedia and Yahoo topics as they are published: train.csv and test.csv without a header (the number of the
class, counted from 1, then title and texts), and classes.txt beside them, one class a line.
"""

import re
from pathlib import Path

from pydantic import Field

from swift_cl.errors import UserError, did_you_mean
from swift_cl.io import read_text
from swift_cl.stream.files import csv_lines
from swift_cl.stream.readers._classes import CLASSIFY
from swift_cl.stream.readers._options import Options as _Options
from swift_cl.stream.readers._options import Prompt, fill
from swift_cl.stream.rows import Row, pair

CLASSES = "classes.txt"


class Options(_Options):
    """Settings.

    Attributes:
        classes: only these classes, in words as `class_name` writes them; empty for all.
        per_class: only the first so many rows of each class.
        prompt: the question, with {input} where title and texts go.
    """

    classes: tuple[str, ...] = ()
    per_class: int | None = Field(default=None, ge=1)
    prompt: Prompt = CLASSIFY


def files(path: Path, options: Options) -> list[Path]:
    """The file, and the names of the classes."""
    return [path, path.parent / CLASSES]


def class_name(published: str) -> str:
    """A class in words: `OfficeHolder` is Office Holder, `Sci/Tech` Science and Technology, `&` and."""
    if published == "Sci/Tech":
        return "Science and Technology"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", published).replace("&", "and")


def read(path: Path, limit: int | None = None, options: Options | None = None) -> list[Row]:
    """Read the rows of the wanted classes."""
    options = options or Options()
    file = path.parent / CLASSES
    known = [class_name(line.strip()) for line in read_text(file).splitlines() if line.strip()]
    for name in options.classes:
        if name not in known:
            raise UserError(f"{file}: no class {name!r}, found: {', '.join(known)}{did_you_mean(name, known)}")
    wanted = options.classes or known
    counts = dict.fromkeys(wanted, 0)
    rows = []
    for number, cells in enumerate(csv_lines(path)):
        where = f"{path}, row {number}"
        if len(cells) < 2 or not cells[0].isdigit() or not 1 <= int(cells[0]) <= len(known):
            raise UserError(f"{where}: expected a class from 1 to {len(known)} and its text, found {cells[0]!r}")
        label, text = known[int(cells[0]) - 1], " ".join(cell for cell in cells[1:] if cell)
        if not text.strip():
            raise UserError(f"{where}: the text is empty")
        if label not in counts or counts[label] == options.per_class:
            continue
        counts[label] += 1
        rows.append(pair(f"{path.stem}-{number}", fill(options.prompt, text), label, labels=wanted))
    return rows[:limit]
