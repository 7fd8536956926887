"""Choosing an adapter for a question: what a method that routes is given, and what it gives back.

When a stage ends, training records its candidates (`Method.candidates`) in stage.json. The evaluator and
`swift-cl deploy --route` hand questions in batches to `Method.route`, in a process that has torch and the base model.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from swift_cl.io import MethodState

Message = Mapping[str, str]


@dataclass(frozen=True)
class Candidate:
    """An adapter that a stage may answer with.

    Attributes:
        name: unique within the stage; the task's, where there is one adapter a task.
        tasks: the tasks whose questions it is the right one for, in the order of learning.
        dir: its folder.
    """

    name: str
    tasks: tuple[str, ...]
    dir: Path


@dataclass(frozen=True)
class RouteRequest:
    """A question to be routed. Neither its reference answer nor its task is part of it.

    Attributes:
        messages: the dialogue up to and with its first question, without a system prompt.
        systems: for each candidate's name the system prompt under which it would be asked; None for the template's
            default.
        system: the system prompt that came with the question itself, None where the stages' own apply.
    """

    messages: tuple[Message, ...]
    systems: Mapping[str, str | None]
    system: str | None = None

    def asked_of(self, candidate: str) -> list[Message]:
        """The messages as that candidate would be asked."""
        system = self.systems[candidate]
        return [*([] if system is None else [{"role": "system", "content": system}]), *self.messages]

    def without_stage(self) -> list[Message]:
        """The messages without the system prompt of any stage, and without the template's: the same whoever answers."""
        return [{"role": "system", "content": self.system or ""}, *self.messages]


@dataclass(frozen=True)
class Route:
    """A choice.

    Attributes:
        chosen: name of the candidate that answers.
        scores: what the router made of each candidate, in its own measure.
    """

    chosen: str
    scores: dict[str, float]


class RouteContext(Protocol):
    """What a method sees when it routes for one stage.

    Attributes:
        candidates: those that the stage recorded, in the order of learning.
        tasks: the tasks learned so far, in order.
        state_dir: the stage's cl_state/.
        device: where the model lives.
        cache: kept for the life of the process, over all stages; a key must name the content it stands for.
    """

    @property
    def candidates(self) -> list[Candidate]: ...
    @property
    def tasks(self) -> list[str]: ...
    @property
    def state_dir(self) -> Path: ...
    @property
    def device(self) -> Any: ...
    @property
    def cache(self) -> dict[Any, Any]: ...

    def state(self) -> MethodState:
        """The state that the method wrote at the end of the stage."""

    def adapter_sha256(self, folder: Path) -> str:
        """Hash of an adapter's weights, for keys of `cache`."""

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt: the template with the generation prompt, without an answer."""

    def model_with(self, folder: Path | None) -> "AbstractContextManager[Any]":
        """The model in eval mode with the adapter of a folder alone, or, for None, the untouched base model."""


def smallest(scores: Mapping[str, float]) -> str:
    """The candidate with the smallest score; of equal ones the first."""
    return min(scores, key=lambda name: scores[name])


def largest(scores: Mapping[str, float]) -> str:
    """The candidate with the largest score; of equal ones the first."""
    return max(scores, key=lambda name: scores[name])
