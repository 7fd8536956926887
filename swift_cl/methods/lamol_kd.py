"""lamol_kd: LAMOL whose generated rows are learnt from the previous model's distributions instead of their tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._lamol import LamolFamily, LamolFamilyConfig
from swift_cl.methods.base import Support, TaskContext, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from swift_cl.methods._frozen_teacher import FrozenTeacher
    from swift_cl.methods._grouped_loss import Groups
else:
    torch = LazyModule("torch")

TEACHER = "lamol_kd_teacher"
GROUPS = ("new/qa", "new/lm", "pseudo/qa", "pseudo/lm")
IS_NEW = [name.startswith("new") for name in GROUPS]


@dataclass
class LamolKdConfig(LamolFamilyConfig):
    """Flags of `lamol_kd`."""

    weight: float = setting(1.0, "Weight of the distillation on generated rows, >= 0.")
    kd_temperature: float = setting(2.0, "Temperature T of both distributions, > 0; the term is multiplied by T^2.")
    hard_weight: float = setting(0.0, "Weight of the cross-entropy on generated rows, >= 0; 0 as published.")

    def validate(self) -> None:
        self.check("lamol_kd")
        for name in ("weight", "hard_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                self.fail("lamol_kd", name, "a number >= 0")
        if not 0 < self.kd_temperature < math.inf:
            self.fail("lamol_kd", "kd_temperature", "a number > 0")
        if self.weight == 0 and self.hard_weight == 0:
            self.fail("lamol_kd", "weight", "more than 0, because with --lamol_kd_hard_weight 0 no old row would count")


class LamolKd(LamolFamily):
    """L = CE_QA + lambda CE_LM on own rows + w (KD_QA + lambda KD_LM) on generated ones, each a token mean."""

    name: ClassVar[str] = "lamol_kd"
    title: ClassVar[str] = "LAMOL with distillation on generated rows"
    summary: ClassVar[str] = "`lamol`, generated rows learnt from the previous model's distributions"
    cost: ClassVar[str] = "as `lamol`, 1 forward on generated rows"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.07887"
    config_class: ClassVar[type[LamolFamilyConfig]] = LamolKdConfig
    support: ClassVar[Support] = Support(tuners=("lora",), full_deepspeed=(), sequence_parallel=False, liger=False)
    config: LamolKdConfig

    def __init__(self, config: LamolKdConfig) -> None:
        super().__init__(config)
        self._distil: Groups | None = None
        self._hard: Groups | None = None
        self._teacher: FrozenTeacher | None = None
        self._asked: list[bool] = []  # whether any rank has generated rows, by micro-batch of the step

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        if ctx.earlier:
            from swift_cl.methods._frozen_teacher import FrozenTeacher

            self._teacher = FrozenTeacher(model, ctx.earlier[-1].weights_dir, TEACHER)
        return model

    def train_begin(self, ctx: TaskContext) -> None:
        from swift_cl.methods._grouped_loss import Groups

        config, same = self.config, {name: name for name in GROUPS}
        scale = {"qa": 1.0, "lm": config.lambda_}

        def weights(pseudo: float) -> dict[str, float]:
            return {n: scale[n[-2:]] * (1.0 if n.startswith("new") else pseudo) for n in GROUPS}

        self._distil = Groups(same, weights(config.weight))
        self._hard = Groups(same, weights(config.hard_weight))

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        from swift_cl.methods._frozen_teacher import asked_in, is_generated

        assert self._distil is not None
        assert self._hard is not None
        self._distil.window(ctx, batches)
        self._hard.window(ctx, batches)
        self._asked = asked_in(ctx, batches, is_generated)

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        from swift_cl.methods._grouped_loss import answer_logits, token_losses

        assert self._distil is not None
        assert self._hard is not None
        logits = answer_logits(self.name, inputs, outputs)
        mask, groups = self._distil.index(inputs, ctx.channels)
        losses = token_losses(logits, inputs["labels"], mask)
        hard = self._distil.sums(losses, groups)
        new = torch.tensor(IS_NEW, device=hard.device)
        soft = torch.where(new, hard, torch.zeros_like(hard))
        if self._asked.pop(0):
            assert self._teacher is not None
            soft = soft + self._teacher.distil(
                ctx, inputs, logits, mask, groups, [not own for own in IS_NEW], self.config.kd_temperature
            )
        total = self._distil.total(ctx, soft, self.name)
        if self.config.hard_weight:
            pseudo = torch.where(new, torch.zeros_like(hard), hard)
            total = total + self._hard.total(ctx, pseudo, f"{self.name}_hard")
        return total

    def checkpoint_state(self, ctx: TaskContext) -> MethodState | None:
        return self._teacher.checkpoint_state() if self._teacher else None

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        from swift_cl.methods._frozen_teacher import check_same_teacher

        check_same_teacher(self._teacher, state)
