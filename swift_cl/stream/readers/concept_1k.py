"""dataset.txt of Concept-1K: blocks of five lines, one block a fact.

    (Concept, Relation, Target)
    Q1: the question that is learned
    A1: its answer
    Q2: the same question in other words
    Q2: its answer again (the published file writes Q2 for A2; both are read)

A task is a group of concepts. The published grouping is in continual_config.json (CONCEPT_LIST and CUR_CLASS); without
it the concepts are divided in the order of the file.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from swift_cl.errors import UserError
from swift_cl.io import read_text
from swift_cl.stream.files import json_object
from swift_cl.stream.readers._options import Prompt, ShareOptions, fill
from swift_cl.stream.rows import Row, pair

LINES = (r"\((?P<concept>.+?), (?P<relation>[^,()]+), (?P<target>.+)\)", r"Q1: .+", r"A1: .+", r"Q2: .+", r"[QA]2: .+")


class Options(ShareOptions):
    """Settings.

    Attributes:
        split: train for Q1 (memorisation), test for Q2 (generalisation).
        config: continual_config.json, relative to the file's folder.
        published: leave the last block out, as the published preparation does (16,653 of 16,654 facts).
        prompt: the question, with {input} where the file's question goes.
    """

    split: Literal["train", "test"] = "train"
    config: str | None = None
    published: bool = False
    prompt: Prompt = "Question: {input}\n Short Answer:"


class Fact(NamedTuple):
    """One block: its number, concept, and questions with their answer."""

    number: int
    concept: str
    train: tuple[str, str]
    test: tuple[str, str]


def files(path: Path, options: Options) -> list[Path]:
    """The file, and the grouping where one is named."""
    return [path] if options.config is None else [path, path.parent / options.config]


def read(path: Path, limit: int | None = None, options: Options | None = None) -> list[Row]:
    """Read the facts of one task."""
    options = options or Options()
    found = facts(path)
    wanted = concepts_of(path, found, options)
    rows = []
    for fact in found[:-1] if options.published else found:
        if fact.concept in wanted:
            question, answer = fact.train if options.split == "train" else fact.test
            rows.append(pair(f"{path.stem}-{options.split}-{fact.number}", fill(options.prompt, question), answer))
    return rows[:limit]


def facts(path: Path) -> list[Fact]:
    """All blocks of the file, checked."""
    lines = read_text(path).rstrip("\n").split("\n")
    found = []
    for start in range(0, len(lines) if lines != [""] else 0, len(LINES)):
        number, block = start // len(LINES), lines[start : start + len(LINES)]
        for offset, pattern in enumerate(LINES):
            line = block[offset] if offset < len(block) else None
            if line is None or not re.fullmatch(pattern, line):
                expected = ("(Concept, Relation, Target)", "Q1: ...", "A1: ...", "Q2: ...", "A2: ...")[offset]
                raise UserError(
                    f"{path}, row {number} (line {start + offset + 1}): found {line!r}, expected {expected!r}"
                )
        head = re.fullmatch(LINES[0], block[0])
        assert head is not None
        first, answer, second, again = (line[4:] for line in block[1:])
        found.append(Fact(number, head["concept"], (first, answer), (second, again)))
    return found


def concepts_of(path: Path, found: list[Fact], options: Options) -> set[str]:
    """The concepts of the task."""
    if options.config is None:
        in_order = list(dict.fromkeys(fact.concept for fact in found))
        return {in_order[i] for i in options.share(len(in_order))}
    file = path.parent / options.config
    config = json_object(file)
    try:
        names, groups = [str(name) for name in config["CONCEPT_LIST"]], config["CUR_CLASS"]
        group = [names[index] for index in groups[options.task]] if options.task < len(groups) else None
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{file}: expected CONCEPT_LIST, and in CUR_CLASS the concepts of each task") from None
    if group is None:
        raise UserError(f"{file}: has {len(groups)} tasks, so there is no task {options.task} (counted from 0)")
    for fact in found:
        if fact.concept not in names:
            raise UserError(f"{path}, row {fact.number}: concept {fact.concept!r} is not in {file.name}")
    return set(group)
