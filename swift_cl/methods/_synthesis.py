"""In-context synthesis: an untouched base model continues a list of real rows with new ones (SSR, pseudo replay)."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.generation.engine import Engine, Prompt
from swift_cl.generation.protocol import Order
from swift_cl.generation.screen import Rejected, Screen, Turns, closed_labels
from swift_cl.io import read_json, read_jsonl
from swift_cl.methods._draws import Key, permutation, seed32
from swift_cl.methods._row_store import exact, round_half_up
from swift_cl.methods.base import TaskContext, TrainingRow

STOP = "\n\nInput:"
_OUTPUT = re.compile(r"^Output:", re.MULTILINE)
_INPUT = re.compile(r"^Input:", re.MULTILINE)
_SHUFFLED_TUPLES = 100_000


@dataclass(frozen=True)
class Demo:
    """A real row as it stands in a prompt; `x` is the user's text without what all of the task's have in common."""

    x: str
    y: str
    system: str


@dataclass(frozen=True)
class TaskFacts:
    """What is kept of a task so that its rows can be synthesised later.

    Attributes:
        rows: |D_j|.
        definition: what all user texts begin with (see `common_frame`); may be empty.
        labels: the closed set of answers, None where there is none.
        separator: between definition and x.
        ending: what all user texts end with, and no prompt shows; may be empty.
    """

    task: str
    rows: int
    definition: str
    labels: list[str] | None
    demos: list[Demo]
    separator: str = "\n\n"
    ending: str = ""

    @classmethod
    def of(
        cls,
        task: str,
        rows: Sequence[TrainingRow],
        method: str,
        ratio: float,
        shots: int,
        *key: Key,
        given: Sequence[Demo] | None = None,
    ) -> "TaskFacts":
        """Describe a task and choose its demos: `ratio` of its rows, at least `shots`, unless they are given.

        Raises:
            UserError: fewer rows than shots can stand in a prompt.
        """
        single = [row["messages"] for row in rows if [m["role"] for m in row["messages"]] == list(_ROLES)]
        frame = definition, separator, ending = common_frame([messages[1]["content"] for messages in single])
        answers = [messages[2]["content"] for messages in single]
        labels = closed_labels(answers) if len(single) == len(rows) else None
        if given is not None:
            return cls(task, len(rows), definition, labels, list(given), separator, ending)
        usable = [demo for messages in single if (demo := _demo(messages, *frame)) is not None]
        if len(usable) < shots:
            raise UserError(
                f"task '{task}': {len(usable)} of its {len(rows)} rows can be shown in a prompt (one question, one "
                f"answer, no line that begins with Input: or Output:), but --{method}_shots is {shots}"
            )
        count = min(max(shots, round_half_up(exact(ratio) * len(rows))), len(usable))
        chosen = sorted(permutation(len(usable), *key, task, "demos")[:count])
        return cls(task, len(rows), definition, labels, [usable[i] for i in chosen], separator, ending)

    def to_json(self) -> dict[str, Any]:
        """What a method's state keeps."""
        return {**vars(self), "demos": [vars(demo) for demo in self.demos]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TaskFacts":
        """The inverse of `to_json`."""
        return cls(**{**value, "demos": [Demo(**demo) for demo in value["demos"]]})

    def order(
        self, ctx: TaskContext, engine: Engine, wanted: int, shots: int, labels: Sequence[str] | None, *key: Key
    ) -> Order:
        """What is asked of the base model for this task."""
        draw = _tuples(len(self.demos), shots, *key, self.task)

        def to_row(turns: Turns, number: int) -> TrainingRow:
            # Where a task has several system prompts, the row gets that of the first row it was modelled on.
            return self.row(turns[0]["content"], turns[1]["content"], self.demos[draw(number)[0]].system)

        return Order(
            task=self.task,
            wanted=wanted,
            prompt=lambda number: Prompt(text=prompt_text(self.definition, [self.demos[i] for i in draw(number)])),
            screen=Screen(
                parse=parse,
                to_row=to_row,
                fits=lambda row: bool(ctx.encode([row])[0]),
                forbidden=engine.special_tokens,
                labels=labels,
                known=[demo.x for demo in self.demos],
            ),
        )

    def row(self, x: str, y: str, system: str) -> TrainingRow:
        """A training row of this task."""
        opening = self.definition + self.separator if self.definition else ""
        contents = (system, opening + x + self.ending, y)
        return {"messages": [{"role": r, "content": c} for r, c in zip(_ROLES, contents, strict=True)]}


_ROLES = ("system", "user", "assistant")


def common_frame(texts: Sequence[str]) -> tuple[str, str, str]:
    """What all texts begin with, how that is set apart from the rest, and what all end with.

    The beginning is the longest that ends at a blank line, without that line (SSR's definition of a task); where there
    is none, the longest that ends at a line break, as of rows with their options in the question. The end is the
    longest that begins with a line break, unless it is all that some text has.
    """
    shared = _shared(texts)
    separator = "\n\n" if "\n\n" in shared else "\n"
    definition = shared.rpartition(separator)[0]
    opening = len(definition + separator) if definition else 0
    rests = [text[opening:] for text in texts]
    at_end = _shared([rest[::-1] for rest in rests])[::-1]
    ending = at_end[at_end.index("\n") :] if "\n" in at_end else ""
    if any(not rest[: len(rest) - len(ending)].strip() for rest in rests):
        ending = ""
    return definition, separator, ending


def _shared(texts: Sequence[str]) -> str:
    """The longest common beginning."""
    first, last = min(texts, default=""), max(texts, default="")  # what these two share, all share
    differs = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differs, min(len(first), len(last)))]


def _demo(messages: Sequence[Mapping[str, str]], definition: str, separator: str, ending: str) -> Demo | None:
    """A row for a prompt, None for one that could not be told from several."""
    system, user, answer = (message["content"] for message in messages)
    opening = len(definition + separator) if definition else 0
    x, y = user[opening : len(user) - len(ending)].strip(), answer.strip()
    try:
        found = parse(f" {x}\nOutput: {y}")
    except Rejected:
        return None
    whole = x and y and [turn["content"] for turn in found] == [x, y]
    return Demo(x, y, system) if whole else None


def read_demos(flag: str, path: Path, shots: int, system: str) -> list[Demo]:
    """Demonstrations of one's own: a JSON list, or JSON lines, of {"input", "output"} and perhaps "system".

    Args:
        system: of those that name none.

    Raises:
        UserError: the file is missing or holds something else, or fewer of them than shots.
    """
    found = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(found, list) or len(found) < shots:
        counted = f"{len(found)} entries" if isinstance(found, list) else type(found).__name__
        raise UserError(
            f"{flag} {path}: expected a list of at least {shots} demonstrations (the shots), found {counted}"
        )
    demos = []
    for number, entry in enumerate(found):
        fields = dict(entry) if isinstance(entry, dict) else {}
        texts = {"system": system, **fields}
        if {"input", "output"} - fields.keys() or texts.keys() - {"input", "output", "system"}:
            raise UserError(
                f'{flag} {path}, entry {number}: expected "input" and "output" (and "system" or not), found '
                f"{', '.join(fields) or type(entry).__name__}"
            )
        if not all(isinstance(text, str) for text in texts.values()):
            raise UserError(f"{flag} {path}, entry {number}: expected texts only")
        contents = (texts["system"], texts["input"], texts["output"])
        demo = _demo([{"content": content} for content in contents], "", "", "")
        if demo is None:
            raise UserError(
                f"{flag} {path}, entry {number}: input and output may not be empty, nor have a line that begins with "
                "Input: or Output:"
            )
        demos.append(demo)
    return demos


def prompt_text(definition: str, demos: Sequence[Demo]) -> str:
    """The text that the base model continues."""
    shown = "".join(f"Input: {demo.x}\nOutput: {demo.y}\n\n" for demo in demos)
    return f"{definition}\n\n{shown}Input:" if definition else f"{shown}Input:"


def parse(text: str) -> Turns:
    """The new row in a continuation; only the continuation is looked at, never the prompt."""
    text = text.partition(STOP)[0]
    if len(_OUTPUT.findall(text)) != 1 or _INPUT.search(text):
        raise Rejected("separators")
    x, y = _OUTPUT.split(text)
    return [{"role": "user", "content": x.strip()}, {"role": "assistant", "content": y.strip()}]


def _tuples(count: int, size: int, *key: Key) -> Any:
    """Candidate number -> an ordered tuple of `size` of `count` demos; none twice before all were drawn."""
    total = math.perm(count, size)

    @cache
    def shuffled(turn: int) -> list[int]:
        return permutation(total, *key, "tuples", turn)

    def draw(number: int) -> list[int]:
        turn, place = divmod(number, total)
        if total <= _SHUFFLED_TUPLES:
            return _unrank(shuffled(turn)[place], count, size)
        # Too many to shuffle: steps of a length that shares no factor with their number meet each of them once.
        step = seed32(*key, "step", turn) * (total // 2**32 + 1) % total
        while math.gcd(step, total) != 1:
            step += 1
        return _unrank((place * step + seed32(*key, "start", turn)) % total, count, size)

    return draw


def _unrank(number: int, count: int, size: int) -> list[int]:
    """The ordered tuple of that number among all."""
    left, found = list(range(count)), []
    for taken in range(size):
        number, i = divmod(number, count - taken)
        found.append(left.pop(i))
    return found
