"""What methods that generate rows have in common: their flags, and what they refuse."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swift_cl.errors import UserError
from swift_cl.generation.engine import BACKENDS, Sampling
from swift_cl.generation.protocol import SPARE, Rules
from swift_cl.methods._row_store import exact
from swift_cl.methods.base import MethodConfig, TaskContext, TrainingRow, setting

_MEDIA = ("images", "videos", "audios")


@dataclass
class GenerationConfig(MethodConfig):
    """Flags of every method that generates; a method sets its own defaults."""

    gen_temperature: float = setting(1.0, "Sampling temperature of generated rows, > 0.")
    top_k: int = setting(0, "Sample among the k most likely tokens, >= 0; 0 is all.")
    top_p: float = setting(1.0, "Sample among the most likely tokens of this total probability, in (0, 1].")
    repetition_penalty: float = setting(1.0, "Penalty of tokens that were there already, >= 1; 1 is none.")
    max_new_tokens: int = setting(1024, "Longest generated text in tokens, >= 1; the model's own limit holds too.")
    gen_backend: str = setting(
        "transformers", "Engine that generates; vllm needs the extra swift_cl[vllm].", choices=BACKENDS
    )
    gen_batch_size: int = setting(64, "Prompts that are generated at a time, >= 1.")
    max_rounds: int = setting(5, "Rounds of candidates at most, >= 1.")
    min_fill: float = setting(
        0.5, "Share of the wanted rows of a task below which the stage fails, in [0, 1]; 0 trains with what there is."
    )
    gen_seed: int = setting(-1, "Seed of the generation, >= 0; -1 is the run's seed.")

    def check(self, method: str) -> None:
        """Refuse values out of range."""
        if not 0 < self.gen_temperature < math.inf:
            self.fail(method, "gen_temperature", "a number > 0")
        if self.top_k < 0:
            self.fail(method, "top_k", "0 or more")
        if not 0 < self.top_p <= 1:
            self.fail(method, "top_p", "a number in (0, 1]")
        if not 1 <= self.repetition_penalty < math.inf:
            self.fail(method, "repetition_penalty", "a number >= 1")
        for name in ("max_new_tokens", "gen_batch_size", "max_rounds"):
            if getattr(self, name) < 1:
                self.fail(method, name, "1 or more")
        if not 0 <= self.min_fill <= 1:
            self.fail(method, "min_fill", "a number in [0, 1]")
        if self.gen_seed < -1:
            self.fail(method, "gen_seed", "0 or more, or -1")

    def sampling(self, stop: tuple[str, ...] = ()) -> Sampling:
        """How candidates are drawn."""
        return Sampling(
            self.gen_temperature, self.max_new_tokens, self.top_k, self.top_p, self.repetition_penalty, stop
        )

    def seed(self, ctx: TaskContext) -> int:
        """The seed of the generation."""
        return ctx.seed if self.gen_seed < 0 else self.gen_seed

    def rules(self, ctx: TaskContext, method: str, spare: float | None = None, keep_all: bool = False) -> Rules:
        """Settings of the protocol for this stage."""
        return Rules(
            method=method,
            stage=ctx.task,
            seed=self.seed(ctx),
            batch_size=self.gen_batch_size,
            max_rounds=self.max_rounds,
            min_fill=exact(self.min_fill),
            spare=SPARE if spare is None else exact(spare),
            keep_all=keep_all,
        )


def refuse_media(method: str, task: str, rows: Sequence[TrainingRow]) -> None:
    """Generated rows are text, so a task with images is none that this method could rehearse."""
    for number, row in enumerate(rows):
        found = [key for key in _MEDIA if row.get(key)]
        if found or not all(isinstance(message["content"], str) for message in row["messages"]):
            raise UserError(
                f"method '{method}' generates text, but row {number} of task '{task}' has "
                f"{', '.join(found) or 'content that is no text'}"
            )
