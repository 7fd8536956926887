"""Grouping tasks by their instructions: TF-IDF similarity of two texts, codebooks, and the group nearest to a text."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from swift_cl.methods._prompts import shared_systems
from swift_cl.methods.base import TrainingRow

LONGEST = 256
"""Characters of a user's text that count as its instruction."""
MUCH_CJK = 0.2
_WORD = re.compile(r"(?u)\b\w\w+\b")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")


@dataclass
class Group:
    """Tasks that share an adapter.

    Attributes:
        name: how routes and reports call it.
        tasks: in the order of learning; the last one's stage holds the adapter.
        texts: the codebook: instruction -> how often it was seen, the most frequent first.
    """

    name: str
    tasks: list[str] = field(default_factory=list)
    texts: dict[str, int] = field(default_factory=dict)

    def add(self, task: str, texts: Mapping[str, int], limit: int) -> None:
        """Let a task join."""
        self.tasks.append(task)
        counts = Counter(self.texts)
        counts.update(texts)
        self.texts = dict(counts.most_common(limit))

    def as_json(self) -> dict[str, Any]:
        """What `group_from` reads; a list keeps the order of the texts."""
        return {"name": self.name, "tasks": self.tasks, "texts": [[text, n] for text, n in self.texts.items()]}


def group_from(value: Mapping[str, Any]) -> Group:
    """A group out of a method's state."""
    return Group(value["name"], list(value["tasks"]), {text: int(n) for text, n in value["texts"]})


def instruction(user: str, system: str | None, source: str) -> str:
    """The instruction of a question.

    Args:
        system: the row's own system prompt, None where it has the stage's.
        source: `auto` (its own system prompt where it has one, else as `first_user`) or `first_user`.
    """
    return system if source == "auto" and system else user[:LONGEST]


def instructions(rows: Sequence[TrainingRow], stage_system: str | None, source: str) -> dict[str, int]:
    """The instructions of a task's rows and how often each was seen, the most frequent first."""
    shared = shared_systems(rows, stage_system)
    counts: Counter[str] = Counter()
    for row in rows:
        head = row["messages"][0]
        system = str(head["content"]) if head["role"] == "system" else None
        user = next((str(m["content"]) for m in row["messages"] if m["role"] == "user"), "")
        counts[instruction(user, None if system in shared else system, source)] += 1
    return dict(counts.most_common())


def similarity(one: str, other: str, tokenizer: str = "word") -> float:
    """Cosine of the TF-IDF vectors of two texts, fitted on the two alone: idf = ln(3 / (1 + df)) + 1.

    Args:
        tokenizer: `word` (two letters or more, lower case) or `char` (characters and pairs of them). Texts with many
            Chinese, Japanese or Korean characters are compared by characters in any case: they have no word borders.
    """
    if tokenizer == "word" and max(cjk_share(one), cjk_share(other)) > MUCH_CJK:
        tokenizer = "char"
    if one == other:
        return 1.0
    a, b = _tokens(one, tokenizer), _tokens(other, tokenizer)
    alone = math.log(3 / 2) + 1  # of a token that one text has; both have idf 1
    weight_a, weight_b = ({t: n * (1.0 if t in y else alone) for t, n in x.items()} for x, y in ((a, b), (b, a)))
    product = sum(weight * weight_b[token] for token, weight in weight_a.items() if token in weight_b)
    norms = math.sqrt(sum(w * w for w in weight_a.values()) * sum(w * w for w in weight_b.values()))
    return product / norms if norms > 0 else 0.0


@lru_cache(maxsize=4096)
def _tokens(text: str, tokenizer: str) -> Counter[str]:
    if tokenizer == "word":
        return Counter(_WORD.findall(text.lower()))
    letters = text.lower()
    return Counter([*letters, *(letters[i : i + 2] for i in range(len(letters) - 1))])


@lru_cache(maxsize=4096)
def cjk_share(text: str) -> float:
    """Share of Chinese, Japanese and Korean characters among those that are no blanks."""
    dense = "".join(text.split())
    return len(_CJK.findall(dense)) / len(dense) if dense else 0.0


def mean_similarity(texts: Sequence[str], group: Group, tokenizer: str) -> float:
    """Mean over all pairs of a text and one of the group's."""
    pairs = [similarity(text, known, tokenizer) for text in texts for known in group.texts]
    return sum(pairs) / len(pairs) if pairs else 0.0
