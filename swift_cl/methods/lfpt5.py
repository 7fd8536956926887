"""lfpt5: a soft prompt per type of task that solves and generates; earlier tasks of the type are rehearsed."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import start_from
from swift_cl.methods._draws import permutation
from swift_cl.methods._gen_rows import TaskMeta
from swift_cl.methods._generating import GenerationConfig
from swift_cl.methods._lamol import GeneratedRehearsal
from swift_cl.methods._routing import Candidate
from swift_cl.methods.base import MethodConfig, Support, TaskContext, TrainingRow, setting
from swift_cl.tuners.soft_prompt import LONGEST

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from swift_cl.methods._frozen_teacher import FrozenTeacher
    from swift_cl.methods._grouped_loss import Groups
else:
    torch = LazyModule("torch")

TEACHER = "lfpt5_teacher"
PARTS = ("new/qa", "new/lm", "pseudo/qa", "pseudo/lm")
DISTILLED = [name == "pseudo/qa" for name in PARTS]
FREQUENT = 5000
"""Most frequent tokens among which a prompt starts."""
FIRST_TYPE = "default"


@dataclass
class Lfpt5Config(GenerationConfig):
    """Flags of `lfpt5`."""

    prompt_length: int = setting(300, f"Number of embeddings of a type's prompt, 1 to {LONGEST}.")
    lambda_lm: float = setting(0.25, "Weight of the loss on generation rows, >= 0.")
    lambda_kl: float = setting(
        0.01, "Weight of the divergence from the old prompt on generated rows, >= 0 ('authors': at most 1)."
    )
    combine: str = setting(
        "paper",
        "'paper' adds the divergence, a mean over generated rows; 'authors' mixes it with the other losses, a sum over "
        "the generated rows of a step.",
        ("paper", "authors"),
    )
    num_per_class: int = setting(2, "Generated rows of each label, >= 1, of tasks with a closed set of labels.")
    num_per_task: int = setting(4, "Generated rows of each other task, >= 1.")
    init: str = setting(
        "vocab",
        "Where a new type's prompt starts: at embeddings of frequent tokens of its rows, or of tokens of its answers "
        "first ('labels').",
        ("vocab", "labels"),
    )
    task_type: str = setting(
        "",
        "The task's type; needed from the second task on. One name, or task=type pairs separated by commas, in which "
        "the current task must be.",
    )
    fkt: bool = setting(False, "A new type's prompt starts from the prompt of the stage before.")
    top_k: int = setting(64, "Sample among the k most likely tokens, >= 0; 0 is all.")
    repetition_penalty: float = setting(2.5, "Penalty of tokens that were there already, >= 1; 1 is none.")
    max_new_tokens: int = setting(256, "Longest generated text in tokens, >= 1; the model's own limit holds too.")

    def validate(self) -> None:
        self.check("lfpt5")
        if not 1 <= self.prompt_length <= LONGEST:
            self.fail("lfpt5", "prompt_length", f"a whole number from 1 to {LONGEST}")
        for name in ("lambda_lm", "lambda_kl"):
            if not 0 <= getattr(self, name) < math.inf:
                self.fail("lfpt5", name, "a number >= 0")
        if self.combine == "authors" and self.lambda_kl > 1:
            self.fail("lfpt5", "lambda_kl", "a number in [0, 1] with --lfpt5_combine authors")
        for name in ("num_per_class", "num_per_task"):
            if getattr(self, name) < 1:
                self.fail("lfpt5", name, "1 or more")
        if self.gen_backend != "transformers":
            self.fail("lfpt5", "gen_backend", "transformers, because vLLM takes no soft prompts")
        pairs = [pair.partition("=") for pair in self.task_type.split(",")]
        if "=" in self.task_type and not all(name.strip() and kind.strip() for name, _, kind in pairs):
            self.fail("lfpt5", "task_type", "a name, or task=type pairs separated by commas")

    def type_of(self, task: str, first: bool) -> str:
        """The type of a task.

        Raises:
            UserError: it is not given.
        """
        if "=" in self.task_type:
            pairs = [pair.split("=", 1) for pair in self.task_type.split(",")]
            known = {name.strip(): kind.strip() for name, kind in pairs}
            if task not in known:
                self.fail("lfpt5", "task_type", f"pairs with one of task '{task}'")
            return known[task]
        if not self.task_type and not first:
            self.fail("lfpt5", "task_type", f"the type of task '{task}': from the second task on it must be said")
        return self.task_type.strip() or FIRST_TYPE


class Lfpt5(GeneratedRehearsal):
    """L = CE_QA + l_lm CE_LM on own and generated rows + l_kl KL(old prompt || new prompt) on generated ones."""

    name: ClassVar[str] = "lfpt5"
    title: ClassVar[str] = "LFPT5: lifelong few-shot language learning with prompt tuning"
    summary: ClassVar[str] = (
        "a soft prompt per type of task that answers and generates; earlier tasks of the type are rehearsed "
        "and distilled"
    )
    cost: ClassVar[str] = "as `lamol`, 1 forward on generated rows, prompt positions"
    paper: ClassVar[str] = "https://arxiv.org/abs/2110.07298"
    config_class: ClassVar[type[MethodConfig]] = Lfpt5Config
    support: ClassVar[Support] = Support(
        tuners=("soft_prompt",), full_deepspeed=(), packing=False, sequence_parallel=False, liger=False
    )
    config: Lfpt5Config

    def __init__(self, config: Lfpt5Config) -> None:
        super().__init__(config)
        self._types: dict[str, str] = {}  # by task, this one last
        self._pooled: Groups | None = None
        self._parts: Groups | None = None
        self._teacher: FrozenTeacher | None = None
        self._asked: list[bool] = []  # whether any rank has generated rows, by micro-batch of the step
        self._generated = 0.0  # question rows of the step that were generated, over all ranks
        self._micro_batches = 1

    def required_flags(self) -> Mapping[str, str]:
        return {
            "tuner_type": "soft_prompt",
            "soft_prompt_length": str(self.config.prompt_length),
            "soft_prompt_mlp": "none",
        }

    # --- types -------------------------------------------------------------------------------------------------------

    def _know_types(self, ctx: TaskContext) -> None:
        known = dict(ctx.previous_state().meta["types"]) if ctx.earlier else {}
        self._types = {**known, ctx.task: self.config.type_of(ctx.task, not known)}

    def _latest(self, ctx: TaskContext) -> Path | None:
        """The prompt of this task's type as the last task of that type left it."""
        own = self._types[ctx.task]
        return next((s.weights_dir for s in reversed(ctx.earlier) if self._types[s.task] == own), None)

    # --- rows --------------------------------------------------------------------------------------------------------

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        self._know_types(ctx)
        if self.config.lambda_lm == 0 and self._latest(ctx) is not None:
            self.config.fail("lfpt5", "lambda_lm", "more than 0 where earlier tasks of the type are to be generated")
        return super().prepare_task(ctx, rows)

    def _rehearsed(self, ctx: TaskContext, earlier: list[TaskMeta]) -> list[TaskMeta]:
        return [meta for meta in earlier if self._types[meta.task] == self._types[ctx.task]]

    def _generator(self, ctx: TaskContext) -> Path:
        latest = self._latest(ctx)
        assert latest is not None
        return latest

    def _wanted(self, metas: Sequence[TaskMeta], current: int) -> Mapping[str, int]:
        config = self.config
        return {m.task: config.num_per_class * len(m.labels) if m.labels else config.num_per_task for m in metas}

    def _most(self, meta: TaskMeta) -> Mapping[str, int] | None:
        return dict.fromkeys(meta.labels, self.config.num_per_class) if meta.labels else None

    # --- the prompt --------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        """Start from the type's own prompt, which also becomes the teacher; or begin a new one."""
        self._know_types(ctx)
        latest = self._latest(ctx)
        if latest is not None:
            if latest != ctx.earlier[-1].weights_dir:
                start_from(self.name, ctx, latest)
            if self.config.lambda_kl > 0:
                from swift_cl.methods._frozen_teacher import FrozenTeacher

                self._teacher = FrozenTeacher(model, latest, TEACHER)
        elif not (ctx.earlier and self.config.fkt):
            from swift_cl.tuners.soft_prompt.start import set_tokens

            set_tokens(model, self._first_tokens(ctx))
        return model

    def _first_tokens(self, ctx: TaskContext) -> list[int]:
        """Tokens at whose embeddings a new prompt starts."""
        read, answered = Counter[int](), Counter[int]()
        for row in filter(None, ctx.encode(ctx.training_rows())):
            read.update(row["input_ids"])
            answered.update(label for label in row["labels"] if label != -100)
        frequent = [token for token, _ in sorted(read.items(), key=lambda item: (-item[1], item[0]))[:FREQUENT]]
        if not frequent:
            raise UserError(f"task '{ctx.task}' has no usable row, so a prompt has nothing to start from")
        drawn = [frequent[i] for i in permutation(len(frequent), self.name, ctx.seed, ctx.task)]
        first = sorted(answered, key=lambda token: (-answered[token], token)) if self.config.init == "labels" else []
        order, length = [*first, *drawn], self.config.prompt_length
        return (order * math.ceil(length / len(order)))[:length]

    # --- loss --------------------------------------------------------------------------------------------------------

    def train_begin(self, ctx: TaskContext) -> None:
        from swift_cl.methods._grouped_loss import Groups

        config = self.config
        share = 1 - config.lambda_kl if self._teacher is not None and config.combine == "authors" else 1.0
        weights = {"qa": share, "lm": share * config.lambda_lm}
        self._pooled = Groups({name: name[-2:] for name in PARTS}, weights)
        self._parts = Groups({name: name for name in PARTS}, dict.fromkeys(PARTS, 1.0))

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        from swift_cl.methods._frozen_teacher import asked_in

        assert self._pooled is not None
        self._pooled.window(ctx, batches)
        self._asked = asked_in(ctx, batches, _is_distilled)
        self._micro_batches = len(batches)
        own = sum(sum(map(_is_distilled, batch.get("channel") or ())) for batch in batches)
        self._generated = float(ctx.all_reduce_sum(torch.tensor(float(own), device=ctx.device)))

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        from swift_cl.methods._grouped_loss import answer_logits, token_losses

        assert self._pooled is not None
        assert self._parts is not None
        logits = answer_logits(self.name, inputs, outputs)
        mask, groups = self._parts.index(inputs, ctx.channels)
        sums = self._parts.sums(token_losses(logits, inputs["labels"], mask), groups)
        total = self._pooled.total(ctx, sums[:2] + sums[2:], self.name)
        if self._asked.pop(0) and self._teacher is not None:
            divergence = self._teacher.distil(ctx, inputs, logits, mask, groups, DISTILLED, 1.0)
            total = total + self.divergence_term(ctx, divergence.sum())
        return total

    def divergence_term(self, ctx: TaskContext, total: "Tensor") -> "Tensor":
        """l_kl times the mean over the step's generated rows, or their sum, from the sum of a micro-batch."""
        rows = self._generated if self.config.combine == "paper" else 1.0
        # Logged values are averaged over micro-batches and ranks; together they give the step's.
        ctx.log("lfpt5_kl", total.detach() * self._micro_batches * ctx.world_size / max(rows, 1.0))
        return self.config.lambda_kl * ctx.window_mean(total, torch.tensor(max(rows, 1.0), device=total.device))

    def checkpoint_state(self, ctx: TaskContext) -> MethodState | None:
        return self._teacher.checkpoint_state() if self._teacher else None

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        from swift_cl.methods._frozen_teacher import check_same_teacher

        check_same_teacher(self._teacher, state)

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        state = super().end_task(ctx)
        if state is not None:
            state.meta = {"types": self._types}
        return state

    # --- inference ---------------------------------------------------------------------------------------------------

    def needs_task_id(self) -> bool:
        """With one type there is one prompt."""
        return len(set(self._types.values())) > 1

    def candidates(self, ctx: TaskContext) -> list[Candidate]:
        """One a type: its prompt as the type's last task left it."""
        folders = {stage.task: stage.weights_dir for stage in (*ctx.earlier, ctx.this_stage)}
        found = []
        for kind in dict.fromkeys(self._types.values()):
            tasks = tuple(task for task in folders if self._types[task] == kind)
            found.append(Candidate(kind, tasks, folders[tasks[-1]]))
        return found


def _is_distilled(channel: str | None) -> bool:
    return channel == "pseudo/qa"
