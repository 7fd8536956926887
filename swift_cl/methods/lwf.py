"""lwf: Learning without Forgetting, distillation from the previous model on the new task's rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.distributed import held, held_before
from swift_cl.errors import RunFailure, UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import AdapterSwitch, is_peft, load_frozen_adapter
from swift_cl.methods._answers import IGNORED, is_encoder_decoder, predicted, unlabelled
from swift_cl.methods.base import Method, MethodConfig, Support, TaskContext, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

TEACHER = "lwf_teacher"
CHECKED_ROWS, CHECKED_LIMIT = 4, 1e-5


@dataclass
class LwfConfig(MethodConfig):
    """Flags of `lwf`."""

    lambda_: float = setting(1.0, "Weight of the distillation term, >= 0.")
    temperature: float = setting(2.0, "Temperature T of both distributions, > 0.")
    t2_scaling: bool = setting(False, "Multiply the term by T^2 (Hinton's rescaling; LwF itself does not).")
    tokens: str = setting(
        "answer",
        "'answer' distils where the next token is a label; 'all' at every next token that is no padding "
        "(computes all logits).",
        ("answer", "all"),
    )
    top_k: int = setting(
        0, "Compare the teacher's k most likely tokens and one bucket for the rest, >= 2; 0 is the full vocabulary."
    )
    chunk_tokens: int = setting(512, "Positions compared at a time, >= 1; bounds the memory of the term.")
    first_task: str = setting(
        "none",
        "'none' trains the first task plainly; 'base' distils it from the untouched base model.",
        ("none", "base"),
    )

    def validate(self) -> None:
        if not 0 <= self.lambda_ < math.inf:
            self.fail("lwf", "lambda_", "a number >= 0")
        if not 0 < self.temperature < math.inf:
            self.fail("lwf", "temperature", "a number > 0")
        if self.top_k != 0 and self.top_k < 2:
            self.fail("lwf", "top_k", "0 or a whole number >= 2")
        if self.chunk_tokens < 1:
            self.fail("lwf", "chunk_tokens", "a whole number >= 1")


class Lwf(Method):
    """CE + lambda sum_t KL(p_t || q_t) / N: p from the previous model, q from this one, both at temperature T.

    With adapters the teacher is the previous stage's adapter, frozen, beside the trained one. In full fine-tuning it
    is a copy of the weights that the stage starts from, put in place of the live ones for its forward.
    """

    name: ClassVar[str] = "lwf"
    title: ClassVar[str] = "Learning without Forgetting"
    summary: ClassVar[str] = "distils the previous model on the new task's rows"
    cost: ClassVar[str] = "about 1.3x"
    paper: ClassVar[str] = "https://arxiv.org/abs/1606.09282"
    config_class: ClassVar[type[MethodConfig]] = LwfConfig
    support: ClassVar[Support] = Support(sequence_parallel=False, liger=False, encoder_decoder=True)
    needs_rows: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True

    config: LwfConfig

    def __init__(self, config: LwfConfig) -> None:
        super().__init__(config)
        self._switch: AdapterSwitch | None = None
        self._adapters: list[str] = []
        self._frozen: dict[str, Tensor] = {}
        self._origin: dict[str, Any] = {"teacher": None, "teacher_sha256": None}
        self._window_count: Tensor | None = None

    @property
    def _has_teacher(self) -> bool:
        return self._switch is not None or bool(self._frozen)

    def required_flags(self) -> Mapping[str, str]:
        # ms-swift computes the logits of answers only, unless it is told not to.
        return {"use_logits_to_keep": "false"} if self.config.tokens == "all" else {}

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        if self.config.lambda_ == 0 or (not ctx.earlier and self.config.first_task == "none"):
            return model
        folder = ctx.earlier[-1].weights_dir if ctx.earlier else None
        self._origin["teacher"] = str(folder) if folder else "base"
        if is_peft(model):
            if folder:
                self._origin["teacher_sha256"] = load_frozen_adapter(model, folder, TEACHER)
                self._adapters = [TEACHER]
            self._switch = AdapterSwitch(model)
        else:
            self._frozen = {name: held(parameter).clone() for name, parameter in ctx.parameters.items()}
        return model

    def train_begin(self, ctx: TaskContext) -> None:
        if self._frozen:
            self._frozen = {name: held_before(ctx.parameters[name], value) for name, value in self._frozen.items()}
            size = sum(t.numel() * t.element_size() for t in self._frozen.values())
            ctx.notice(f"full fine-tuning: the teacher takes {size / 2**30:.3g} GiB more")
        if self._has_teacher and ctx.earlier and ctx.step == 0:
            self._check_start(ctx)

    def _check_start(self, ctx: TaskContext) -> None:
        """Before the first step the student is the teacher; if they differ, one of them was not loaded."""
        rows = ctx.encode(ctx.training_rows()[: 16 * CHECKED_ROWS])
        for row in [row for row in rows if row][:CHECKED_ROWS]:
            inputs = ctx.collate([row])
            with torch.no_grad(), ctx.statistics_mode():
                module = ctx.module_for_forward
                student = module(**unlabelled(module, inputs))
            total, count = self._divergence(ctx, inputs, student)
            per_token = float(total / count.clamp(min=1))
            if not abs(per_token) < CHECKED_LIMIT:
                raise RunFailure(
                    f"lwf: before the first step the divergence from the previous model is {per_token:.3g} per token, "
                    f"expected < {CHECKED_LIMIT:g}; the stage did not start from {self._origin['teacher']}"
                )

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        if self._has_teacher and self.config.tokens == "all":
            counts = [self._positions(ctx, batch).sum() for batch in batches]
            self._window_count = ctx.all_reduce_sum(torch.stack(counts).sum().to(ctx.device)).clamp(min=1)

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        if not self._has_teacher:
            return None
        total, count = self._divergence(ctx, inputs, outputs)
        ctx.log("lwf_kl", total.detach() / count.clamp(min=1), int(count))
        if self.config.tokens == "all":
            assert self._window_count is not None
            term = ctx.window_mean(total, self._window_count)
        else:
            term = ctx.token_mean(total, count.clamp(min=1))
        scale = self.config.lambda_ * (self.config.temperature**2 if self.config.t2_scaling else 1.0)
        return term * scale

    def _divergence(self, ctx: TaskContext, inputs: Mapping[str, Any], outputs: Any) -> "tuple[Tensor, Tensor]":
        """(sum of KL over the distilled positions, their number) of one micro-batch."""
        from swift_cl.methods._distillation import divergence_sum

        student = getattr(outputs, "logits", None)
        labels = inputs["labels"]
        if student is None or student.shape[:2] != labels.shape[:2]:
            found = "none" if student is None else f"{tuple(student.shape[:2])} for labels {tuple(labels.shape)}"
            raise UserError(f"method 'lwf' needs the model's logits at every label, found {found}")
        if self.config.tokens == "all" and inputs.get("logits_to_keep") is not None:
            raise UserError("--lwf_tokens all needs the logits of every position: add --use_logits_to_keep false")
        teacher = self._teacher_logits(ctx, inputs)
        if teacher.shape != student.shape:
            raise UserError(
                f"the teacher's logits are {tuple(teacher.shape)} and the student's {tuple(student.shape)}; method "
                "'lwf' needs the same vocabulary in every stage"
            )
        positions = self._positions(ctx, inputs)
        total = divergence_sum(
            student.flatten(0, 1),
            teacher.flatten(0, 1),
            positions.flatten(),
            self.config.temperature,
            self.config.top_k,
            self.config.chunk_tokens,
        )
        return total, positions.sum()

    def _positions(self, ctx: TaskContext, batch: Mapping[str, Any]) -> "Tensor":
        """Which logits are distilled, [batch, length]."""
        labels: Tensor = batch["labels"]
        if self.config.tokens == "answer" or is_encoder_decoder(ctx.module_for_forward):  # its logits are the answer's
            return predicted(ctx.module_for_forward, labels) != IGNORED
        attention, position_ids = batch.get("attention_mask"), batch.get("position_ids")
        real = torch.ones_like(labels, dtype=torch.bool)
        if attention is not None and attention.shape == labels.shape:
            real = attention.bool()
        wanted = real[:, 1:] & real[:, :-1]
        if position_ids is not None and position_ids.dim() == 3:  # a plane a dimension of multimodal positions
            position_ids = position_ids[0]
        if position_ids is not None and position_ids.shape == labels.shape:
            wanted = wanted & (position_ids[:, 1:] > 0)  # packed rows: the next row's first token is not predicted
        # The logits at the last position predict nothing that is known.
        return torch.nn.functional.pad(wanted, (0, 1), value=False)

    def _teacher_logits(self, ctx: TaskContext, inputs: Mapping[str, Any]) -> "Tensor":
        """The previous model's logits for exactly the student's inputs, so that positions match by construction."""
        given = unlabelled(ctx.module_for_forward, inputs)
        with torch.no_grad(), ctx.statistics_mode():
            if self._switch is None:
                logits: Tensor = ctx.forward_with(self._frozen, given).logits
            else:
                with self._switch.active(*self._adapters):
                    logits = ctx.module_for_forward(**given).logits
        return logits

    def checkpoint_state(self, ctx: TaskContext) -> MethodState | None:
        return MethodState(meta=dict(self._origin)) if self._has_teacher else None

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        stored = state.meta.get("teacher_sha256")
        if stored != self._origin["teacher_sha256"]:
            raise UserError(
                f"the checkpoint was trained with another teacher: sha256 {stored}, but {self._origin['teacher']} has "
                f"{self._origin['teacher_sha256']}"
            )

    def end_task(self, ctx: TaskContext) -> MethodState:
        return MethodState(meta=dict(self._origin))
