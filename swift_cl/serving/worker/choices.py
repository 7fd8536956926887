"""Answers that can only be one of given texts. Imported by file path, so it knows nothing of swift_cl.

A request names them as vLLM does, `{"structured_outputs": {"choice": [...]}}`. ms-swift's request has a place for a
regular expression alone, which carries them to the engine: vLLM gets an expression, our transformers engine a JSON
list.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_SPECIAL = re.compile(r"[\\.^$*+?()\[\]{}|/-]")


def asked_for(body: Any) -> "list[str]":
    """The texts of a request's body; empty where any answer will do.

    Raises:
        ValueError: the field does not hold texts, or asks for something else than a choice.
    """
    wanted = body.get("structured_outputs") if isinstance(body, dict) else None
    if wanted is None:
        return []
    found = wanted.get("choice") if isinstance(wanted, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text for text in found):
        raise ValueError("structured_outputs: expected {'choice': [text, ...]}")
    return found


def as_expression(texts: Sequence[str]) -> str:
    """A regular expression that matches the texts and nothing else."""
    return "|".join(f"({_SPECIAL.sub(lambda found: chr(92) + found[0], text)})" for text in texts)


def packed(texts: Sequence[str]) -> str:
    """The texts for `unpacked`."""
    return json.dumps(list(texts))


def unpacked(text: "str | None") -> "list[str]":
    """The texts of `packed`; empty for None."""
    return json.loads(text) if text else []


class Choices:
    """Which tokens may come next, as `generate` asks it (`prefix_allowed_tokens_fn`): those of a tree of token
    sequences, then an end token. One object serves one call of `generate`, whose rows have prompts of one (padded)
    length.

    Args:
        sequences: the tokens of each text.
        ends: tokens that end an answer.
    """

    def __init__(self, sequences: Iterable[Sequence[int]], ends: Sequence[int]) -> None:
        self._tree: dict[int, Any] = {}
        self._whole: set[int] = set()
        self._ends = list(ends)
        self._prompt: int | None = None
        for sequence in sequences:
            node = self._tree
            for token in sequence:
                node = node.setdefault(token, {})
            self._whole.add(id(node))

    def __call__(self, batch_id: int, input_ids: Any) -> "list[int]":
        if self._prompt is None:
            self._prompt = len(input_ids)
        node = self._tree
        for token in input_ids[self._prompt :].tolist():
            if token not in node:
                return self._ends  # the row has ended; what follows is padding
            node = node[token]
        return [*node, *(self._ends if id(node) in self._whole else [])]
