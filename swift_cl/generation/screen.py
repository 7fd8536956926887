"""Which candidates become rows: complete, parsable, of a size that fits, with a valid label, and no copies."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift_cl.generation.engine import Answer

CLOSED_ANSWERS = 64
"""A task with more different answers has no closed set of labels."""
ROWS_A_LABEL = 10
"""Nor has one with fewer rows a label."""

Turns = list[dict[str, str]]
Row = dict[str, Any]


class Rejected(Exception):
    """A candidate that is no row; the text is the reason, by which they are counted."""


def collapsed(text: str) -> str:
    """A text for comparisons: runs of white space are one blank."""
    return " ".join(text.split())


def closed_labels(answers: Sequence[str]) -> list[str] | None:
    """The set of answers of a task, sorted, if it is a closed one."""
    labels = sorted(set(answers))
    closed = len(labels) <= CLOSED_ANSWERS and len(answers) >= ROWS_A_LABEL * len(labels)
    return labels if labels and closed else None


def _plain(answer: str) -> str:
    return answer.strip().rstrip(".。").rstrip()


@dataclass
class Screen:
    """Looks at the candidates of one task in order.

    Attributes:
        parse: the turns that a text holds, assistant last; raises `Rejected`.
        to_row: the training row of such turns and of the candidate's number.
        fits: whether the training template keeps a row.
        forbidden: separators and special tokens that no turn may hold.
        labels: the only valid answers, None where any answer is.
        known: questions that would be copies of rows at hand.
        most: rows of each label at most, None for any number.
    """

    parse: Callable[[str], Turns]
    to_row: Callable[[Turns, int], Row]
    fits: Callable[[Row], bool]
    forbidden: Sequence[str] = ()
    labels: Sequence[str] | None = None
    known: Sequence[str] = ()
    most: Mapping[str, int] | None = None
    _seen: set[str] = field(default_factory=set)
    _labels: Counter[str] = field(default_factory=Counter)

    def look(self, answer: Answer, candidate: int) -> Row:
        """The row of a candidate.

        Raises:
            Rejected: the first reason that applies, in the order of this function.
        """
        if answer.finish_reason != "stop":
            raise Rejected("truncated")
        turns = self.parse(answer.text)
        for role, reason in (("user", "empty_x"), ("assistant", "empty_y")):
            if not all(turn["content"].strip() for turn in turns if turn["role"] == role):
                raise Rejected(reason)
        if any(text in turn["content"] for turn in turns for text in self.forbidden):
            raise Rejected("separator_or_special_token_inside")
        turns = self._labelled(turns)
        row = self.to_row(turns, candidate)
        if not self.fits(row):
            raise Rejected("too_long")
        if turns[-1]["content"] == "":
            raise Rejected("label_set")
        question = collapsed(next(turn["content"] for turn in turns if turn["role"] == "user"))
        if question in self._seen:
            raise Rejected("duplicate")
        if question in {collapsed(text) for text in self.known}:
            raise Rejected("copy")
        label = turns[-1]["content"]
        if self.most is not None and self._labels[label] >= self.most[label]:
            raise Rejected("label_full")
        self._seen.add(question)
        self._labels[label] += 1
        return row

    def _labelled(self, turns: Turns) -> Turns:
        """The answer as the label that it means, empty where it means none."""
        if self.labels is None:
            return turns
        meant = {_plain(label): label for label in self.labels}
        return [*turns[:-1], {**turns[-1], "content": meant.get(_plain(turns[-1]["content"]), "")}]
