"""sdft: self-distillation, the model's own answers corrected by itself with a demonstration before its eyes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.distributed import part_of
from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import AdapterSwitch
from swift_cl.methods._draws import seed32
from swift_cl.methods._generating import refuse_media
from swift_cl.methods._state import check_shapes, pack, shapes_of, unpack
from swift_cl.methods.base import Method, MethodConfig, Support, TaskContext, TrainingRow, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

CHUNK = 1024
CLOSING = "Now answer with a response of your own, including the thinking process."
_BEFORE = "This is an example for a response to the question:"


@dataclass
class SdftConfig(MethodConfig):
    """Flags of `sdft`."""

    teacher: str = setting(
        "ema",
        "Whose weights the teacher has: an average of the student's ('ema'), the 'base' model's, or the student's own "
        "at each step ('live').",
        ("ema", "base", "live"),
    )
    ema: float = setting(0.01, "Share of the student's weights in each update of the average, in (0, 1].")
    divergence: str = setting(
        "reverse",
        "What is minimised: KL(student || teacher), 'reverse', as in the paper, or KL(teacher || student), 'forward', "
        "as in the released code.",
        ("reverse", "forward"),
    )
    temperature: float = setting(
        1.0, "Temperature at which the student's answers are sampled, >= 0; 0 takes the likeliest token each time."
    )
    max_new_tokens: int = setting(256, "Longest answer of the student in tokens, >= 1.")
    skip_tokens: int = setting(
        0, "First tokens of an answer that are not trained, >= 0 (the released code skips 3); the last one always is."
    )
    closing: str = setting(CLOSING, "Last line of the teacher's prompt, after the demonstration; may be empty.")
    gen_batch: int = setting(16, "Answers sampled at a time on each process, >= 1.")

    def validate(self) -> None:
        if not 0 < self.ema <= 1:
            self.fail("sdft", "ema", "a number in (0, 1]")
        if self.teacher != "ema" and self.ema != SdftConfig.ema:
            self.fail("sdft", "ema", f"{SdftConfig.ema}, because only --sdft_teacher ema uses it")
        if not 0 <= self.temperature < math.inf:
            self.fail("sdft", "temperature", "a number >= 0")
        for name, least in (("max_new_tokens", 1), ("skip_tokens", 0), ("gen_batch", 1)):
            if getattr(self, name) < least:
                self.fail("sdft", name, f"a whole number >= {least}")


class Sdft(Method):
    """min over theta of KL(pi_theta(. | x, y_<n) || pi(. | x, demonstration, y_<n)) on answers y ~ pi_theta(. | x).

    Before an optimizer step its rows get the student's answers in place of the given ones; the Trainer's own forward is
    then the student's, and one more, without gradient, the teacher's.
    """

    name: ClassVar[str] = "sdft"
    title: ClassVar[str] = "Self-distillation fine-tuning (SDFT)"
    summary: ClassVar[str] = "learns its own answers as it would give them with the right one shown in its prompt"
    cost: ClassVar[str] = "sampling of answers, 1 forward"
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.19897"
    config_class: ClassVar[type[MethodConfig]] = SdftConfig
    support: ClassVar[Support] = Support(
        tuners=("lora",),
        full_deepspeed=(),
        zero0_low_precision=False,
        packing=False,
        sequence_parallel=False,
        liger=False,
    )
    needs_rows: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    replaces_loss: ClassVar[bool] = True

    config: SdftConfig

    def __init__(self, config: SdftConfig) -> None:
        super().__init__(config)
        self._average: dict[str, Tensor] = {}  # fp32, by name of the trained parameter
        self._switch: AdapterSwitch | None = None
        self._waiting: list[tuple[list[list[int]], list[list[int]]]] = []  # of the coming micro-batches
        self._window_count: Tensor | None = None

    def required_flags(self) -> Mapping[str, str]:
        # A padding-free collator joins the rows of a micro-batch into one.
        return {"padding_free": "false"}

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        """The same rows, each with its number: a batch says which they are."""
        refuse_media(self.name, ctx.task, rows)
        for number, row in enumerate(rows):
            if row["messages"][-1]["role"] != "assistant":
                raise UserError(
                    f"row {number} of task '{ctx.task}' ends without an answer, which method 'sdft' shows its teacher"
                )
        return [{**row, "channel": str(number)} for number, row in enumerate(rows)]

    # --- the teacher -------------------------------------------------------------------------------------------------

    def train_begin(self, ctx: TaskContext) -> None:
        if self.config.teacher == "base":
            self._switch = AdapterSwitch(ctx.model)
        if self.config.teacher == "ema":
            self._average = {name: weight.clone() for name, weight in ctx.weights().items()}

    def after_step(self, ctx: TaskContext) -> None:
        if self._average:
            weights = ctx.weights()
            live = [weights[name] for name in self._average]
            torch._foreach_lerp_(list(self._average.values()), live, self.config.ema)

    def _teacher_logits(self, ctx: TaskContext, prompts: list[list[int]], answers: list[list[int]]) -> "Tensor":
        """The teacher's logits for each token of the answers, row after row, [tokens, vocabulary]."""
        from swift_cl.generation.live import padded_left
        from swift_cl.methods._embeddings import last_logits
        from swift_cl.methods._prompts import padded

        before, before_mask = padded_left(prompts, ctx.device)
        after, after_mask = padded(answers, ctx.device)
        mask = torch.cat([before_mask, after_mask], dim=1)
        module, width = ctx.module_for_forward, after.shape[1]
        given = {
            "input_ids": torch.cat([before, after], dim=1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
            "use_cache": False,
            **last_logits(module, width + 1),
        }
        with torch.no_grad(), ctx.statistics_mode():
            if self._switch is not None:
                with self._switch.active():
                    logits = module(**given).logits
            elif self._average:
                own = {name: part_of(ctx.parameters[name], value) for name, value in self._average.items()}
                logits = ctx.forward_with(own, given).logits
            else:
                logits = module(**given).logits
        # The logits before an answer's first token predict it; those of its last predict nothing that is known.
        chosen: Tensor = logits[:, -width - 1 : -1][after_mask.bool()]
        return chosen

    # --- training ----------------------------------------------------------------------------------------------------

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        """Let the student answer the rows of the coming step, and put its answers in place of the given ones."""
        from swift_cl.generation.live import sample

        rows = ctx.training_rows()
        numbers = [int(number) for batch in batches for number in batch["channel"]]
        messages = [rows[number]["messages"] for number in numbers]
        prompts = ctx.encode_prompts([own[:-1] for own in messages])
        shown = ctx.encode_prompts([with_demonstration(own, self.config.closing) for own in messages])
        rounds = torch.zeros(ctx.world_size, device=ctx.device)
        rounds[ctx.rank] = math.ceil(len(prompts) / self.config.gen_batch)
        with ctx.statistics_mode():
            answers = sample(
                ctx.module_for_forward,
                prompts,
                [seed32(self.name, ctx.seed, ctx.task, number, ctx.step) for number in numbers],
                temperature=self.config.temperature,
                max_new_tokens=self.config.max_new_tokens,
                stop_tokens=ctx.stop_tokens,
                at_once=self.config.gen_batch,
                rounds=int(ctx.all_reduce_sum(rounds).max()),
            )
        ended = sum(answer[-1] in ctx.stop_tokens for answer in answers)
        ctx.log("sdft_cut_off", 1 - ended / max(1, len(answers)))
        self._waiting = []
        total = torch.zeros((), device=ctx.device)
        start = 0
        for batch in batches:
            part = slice(start, start + len(batch["channel"]))
            start = part.stop
            total += self._replace(ctx, batch, prompts[part], answers[part])
            self._waiting.append((shown[part], answers[part]))
        self._window_count = ctx.all_reduce_sum(total).clamp(min=1)

    def _replace(
        self, ctx: TaskContext, batch: Mapping[str, Any], prompts: list[list[int]], answers: list[list[int]]
    ) -> int:
        """Make a micro-batch one of the student's answers; returns the number of tokens that are trained."""
        from swift_cl.methods._prompts import padded

        joined = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        ids, mask = padded(joined, ctx.device)
        labels = torch.full_like(ids, -100)
        count = 0
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            skipped = min(self.config.skip_tokens, len(answer) - 1)
            begin, end = len(prompt) + skipped, len(prompt) + len(answer)
            labels[row, begin:end] = ids[row, begin:end]
            count += end - begin
        channels = batch["channel"]
        replaced: dict[str, Any] = batch  # type: ignore[assignment]  # the Trainer's own, which it hands on
        replaced.clear()
        replaced.update({"input_ids": ids, "attention_mask": mask, "labels": labels, "channel": channels})
        return count

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        from swift_cl.methods._distillation import divergence_sum
        from swift_cl.methods._grouped_loss import answer_logits

        assert self._window_count is not None
        logits = answer_logits(self.name, inputs, outputs)
        student = logits[:, :-1][inputs["labels"][:, 1:] != -100]
        prompts, answers = self._waiting.pop(0)
        teacher = self._teacher_logits(ctx, prompts, answers)
        trained = [i >= min(self.config.skip_tokens, len(answer) - 1) for answer in answers for i in range(len(answer))]
        teacher = teacher[torch.tensor(trained, device=teacher.device)]
        mask = torch.ones(len(student), dtype=torch.bool, device=student.device)
        reverse = self.config.divergence == "reverse"
        total = divergence_sum(student, teacher, mask, 1.0, 0, CHUNK, reverse)
        ctx.log("sdft_kl", total.detach() / max(1, len(student)), len(student))
        return ctx.window_mean(total, self._window_count)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def checkpoint_state(self, ctx: TaskContext) -> MethodState | None:
        if self.config.teacher != "ema":
            return None
        return MethodState(pack(average=self._average), {"parameters": shapes_of(self._average)})

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        check_shapes(self.name, state.meta["parameters"], shapes_of(self._average))
        stored = unpack(state.tensors, "average")
        self._average = {name: stored[name].to(old.device, copy=True) for name, old in self._average.items()}


def with_demonstration(messages: Sequence[Mapping[str, Any]], closing: str) -> list[Mapping[str, Any]]:
    """The prompt of a row as the teacher sees it: its answer shown as an example after the last question."""
    *before, question, answer = messages
    text = f"{question['content']}\n\n{_BEFORE}\n{answer['content']}" + (f"\n\n{closing}" if closing else "")
    return [*before, {**question, "content": text}]
