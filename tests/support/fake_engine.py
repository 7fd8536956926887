"""An engine that says what it is told, and remembers what it was asked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from swift_cl.generation.engine import Answer, Batch, Prompt, Sampling, one_by_one

Speaks = Callable[[Prompt, int], Answer]


def said(text: str, finish_reason: str = "stop") -> Answer:
    """An answer of as many tokens as words."""
    return Answer(text, finish_reason, len(text.split()))


class FakeEngine:
    """Answers with `speaks(prompt, seed)`."""

    def __init__(self, speaks: Speaks, name: str = "fake") -> None:
        self.speaks = speaks
        self.identity: Mapping[str, Any] = {"base": "fake", "adapter_sha256": name, "engine": "fake"}
        self.special_tokens: Sequence[str] = ["<|end|>"]
        self.calls: list[tuple[list[Prompt], Sampling, list[int]]] = []

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Answer]:
        self.calls.append((list(prompts), sampling, list(seeds)))
        return [self.speaks(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def answer_batches(self, batches: Sequence[Batch], sampling: Sampling) -> list[list[Answer]]:
        return one_by_one(self, batches, sampling)

    def embed(self, texts: Sequence[str]) -> Any:
        return np.array([[len(text), sum(map(ord, text)) % 97] for text in texts], dtype=float)

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts that it was asked."""
        return [prompt for prompts, _, _ in self.calls for prompt in prompts]


def in_order(*answers: Answer) -> Speaks:
    """Gives these answers one after the other, whatever is asked, then the last one for ever."""
    left = list(answers)
    return lambda prompt, seed: left.pop(0) if len(left) > 1 else left[0]


class Engines:
    """Opens `engines[weights]` (None: the base model) as a context does, and remembers which were opened."""

    def __init__(self, engines: Mapping[Path | None, FakeEngine]) -> None:
        self.engines = dict(engines)
        self.opened: list[Path | None] = []

    @contextmanager
    def __call__(self, weights: Path | None, backend: str) -> Iterator[FakeEngine]:
        self.opened.append(weights)
        yield self.engines[weights]
