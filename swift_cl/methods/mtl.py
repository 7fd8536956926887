"""mtl: joint training on all tasks so far, started from the base model; the ceiling beside every table."""

from dataclasses import dataclass
from typing import ClassVar

from swift_cl.io import MethodState
from swift_cl.methods.base import Method, MethodConfig, Support, TaskContext, TrainingRow

ROWS = "rows"


@dataclass
class MtlConfig(MethodConfig):
    """`mtl` has no settings of its own."""


class Mtl(Method):
    """theta_t = argmin over theta of CE(D_1 + ... + D_t), started from the base model."""

    name: ClassVar[str] = "mtl"
    title: ClassVar[str] = "Multi-task (joint) training"
    summary: ClassVar[str] = "joint training on all tasks so far: the ceiling of Avg.ACC"
    cost: ClassVar[str] = "none (more rows)"
    config_class: ClassVar[type[MethodConfig]] = MtlConfig
    support: ClassVar[Support] = Support(any_tuner=True, encoder_decoder=True)
    needs_rows: ClassVar[bool] = True
    starts_fresh: ClassVar[bool] = True

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        """The rows of all tasks, in task order; the first task's stay as they are. The Trainer shuffles."""
        return self._earlier(ctx) + rows if ctx.earlier else rows

    def end_task(self, ctx: TaskContext) -> MethodState:
        rows = self._earlier(ctx) + ctx.training_rows()
        return MethodState(meta={"rows": len(rows)}, rows={ROWS: rows})

    def _earlier(self, ctx: TaskContext) -> list[TrainingRow]:
        return ctx.previous_state().rows[ROWS] if ctx.earlier else []
