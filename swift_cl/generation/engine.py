"""What generation asks of an engine: prompts in, answers out, batch by batch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from swift_cl.io import sha256_json
from swift_cl.progress import with_bar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True)
class Prompt:
    """What the model is to continue: a conversation in the training template, or plain text without any template.

    Attributes:
        messages: system prompt and turns; the model answers the last one.
        text: plain text to be continued instead.
        latent: added to the embedding of every token, of the prompt and of the answer; empty for none. The
            transformers engine alone can.
        latent_on_answer: whether the answer's tokens get it too.
    """

    messages: tuple[Mapping[str, str], ...] = ()
    text: str | None = None
    latent: tuple[float, ...] = ()
    latent_on_answer: bool = True

    @classmethod
    def chat(cls, system: str, user: str) -> "Prompt":
        """One question under a system prompt; an empty one is given as such, not replaced by the template's default."""
        return cls(({"role": "system", "content": system}, {"role": "user", "content": user}))

    @cached_property
    def sha256(self) -> str:
        """Identity of the prompt."""
        latent = [list(self.latent), self.latent_on_answer] if self.latent else []
        return sha256_json([list(map(dict, self.messages)), self.text, *latent])

    def to_json(self) -> dict[str, Any]:
        """For another process."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "messages": [dict(message) for message in self.messages],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Prompt":
        """The inverse of `to_json`."""
        return cls(**{**value, "messages": tuple(value["messages"]), "latent": tuple(value["latent"])})

    @property
    def length(self) -> int:
        """Characters, to put prompts of one size into one batch."""
        return len(self.text or "") + sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy.

    Attributes:
        top_k: 0 for all tokens.
        stop: strings that end an answer; an answer is cut before the first of them.
        beams: hypotheses of a beam search, 1 for none; the transformers engine alone can.
    """

    temperature: float
    max_new_tokens: int
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    beams: int = 1

    def to_json(self) -> dict[str, Any]:
        """For hashes and manifests."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: without end-of-sequence token and stop string; other special tokens stay visible in it.
        finish_reason: `stop`, or `length` where it was cut off.
        tokens: number of generated tokens.
    """

    text: str
    finish_reason: str
    tokens: int = 0


Batch = tuple[Sequence[Prompt], Sequence[int]]
"""Prompts, and one seed each."""


class Engine(Protocol):
    """A model that is ready to answer."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Base model, adapter hash, engine and version: with prompts, sampling and seeds, what an answer depends on."""

    @property
    def special_tokens(self) -> Sequence[str]:
        """Texts of the tokenizer's special tokens, which no row may hold."""

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Answer]:
        """Answer one batch; `seeds` has one number a prompt. The same call gives the same answers."""

    def answer_batches(self, batches: Sequence[Batch], sampling: Sampling) -> list[list[Answer]]:
        """Answer several batches, as `answer` would one after the other; where several processes have the model, they
        share them."""

    def embed(self, texts: Sequence[str]) -> "NDArray[np.float64]":
        """Mean of the last hidden states over each text's tokens, [texts, width].

        Raises:
            UserError: this engine gives no hidden states.
        """


def one_by_one(engine: Engine, batches: Sequence[Batch], sampling: Sampling, shown: bool = True) -> list[list[Answer]]:
    """`answer_batches` in this process, with a bar where it is shown."""
    work = with_bar(batches, "generating", "batch", shown=shown)
    return [engine.answer(prompts, sampling, seeds) for prompts, seeds in work]
