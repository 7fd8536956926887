"""Classification tasks: a task is a group of classes, and its rows are those of its classes."""

from collections.abc import Iterable
from pathlib import Path

from swift_cl.errors import UserError
from swift_cl.stream.readers._options import Prompt, ShareOptions, fill
from swift_cl.stream.rows import Row, pair

CLASSIFY = "Input sentence: {input}\n The label:"


class ClassOptions(ShareOptions):
    """Settings: a task's share of the classes, in their order; and how a sentence is put."""

    prompt: Prompt = CLASSIFY


def readable(label: str) -> str:
    """A class as words: data sets write underscores for spaces."""
    return label.replace("_", " ")


def class_rows(
    path: Path, samples: Iterable[tuple[str, str, str]], classes: list[str], options: ClassOptions
) -> list[Row]:
    """The rows of the task's classes.

    Args:
        samples: (how an error names it, sentence, class), the class in the data set's own writing.
        classes: all classes in their order.

    Raises:
        UserError: the classes cannot be divided evenly, or a sample is of another class.
    """
    if len(classes) % options.tasks:
        raise UserError(f"{path}: {len(classes)} classes cannot be divided evenly into {options.tasks} tasks")
    own = [classes[i] for i in options.share(len(classes))]
    labels = tuple(readable(label) for label in own)
    rows = []
    for number, (where, sentence, label) in enumerate(samples):
        if label not in classes:
            raise UserError(f"{where}: class {label!r} is not one of the {len(classes)} known ones")
        if label in own:
            question = fill(options.prompt, sentence)
            rows.append(pair(f"{path.stem}-{number}", question, readable(label), labels=labels))
    return rows
