"""dynamic_conpet_cls: ConPET for classification, an adapter and a head a task, and the selector of `dynamic_conpet`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.distributed import copy_into
from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import check_plain_lora
from swift_cl.methods._classes import CLASSIFIER_SUPPORT, Classifying, parse_labels, refuse_images
from swift_cl.methods._draws import seed32
from swift_cl.methods.base import Support, TaskContext, TrainingRow, setting
from swift_cl.methods.dynamic_conpet import DynamicConpet, DynamicConpetConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

CLASSES_FILE = "classes.json"
SAME_FOR_ALL = ("labels", "scenario", "null_logit")
"""Settings that every stage of a run shares."""


@dataclass
class DynamicConpetClsConfig(DynamicConpetConfig):
    """Flags of `dynamic_conpet_cls`."""

    labels: str = setting(
        "",
        'The labels of all tasks in their order, {"task": ["label", ...], ...}: JSON text, or a JSON file. '
        "`swift-cl run` sets it from a benchmark whose scenario is a classification.",
    )
    scenario: str = setting(
        "cil",
        "'cil' (class-incremental): the selector chooses the expert; 'til' (task-incremental): the question's task is "
        "given. `swift-cl run` sets it from the benchmark.",
        ("cil", "til"),
    )
    null_logit: float = setting(-100.0, "Logit of the classes of experts that were not chosen, < 0.")

    def validate(self) -> None:
        self.check("dynamic_conpet_cls")
        if not -math.inf < self.null_logit < 0:
            self.fail("dynamic_conpet_cls", "null_logit", "a number < 0")
        if self.labels:
            parse_labels(self.labels, "--dynamic_conpet_cls_labels")


class DynamicConpetCls(Classifying, DynamicConpet):
    """Expert t is a LoRA with a linear head over the classes of task t; all other experts' classes have one constant
    logit, in training (where the right expert is chosen) and at inference alike."""

    name: ClassVar[str] = "dynamic_conpet_cls"
    title: ClassVar[str] = "Dynamic ConPET for classification: an adapter with a head per task, and a selector"
    summary: ClassVar[str] = "`dynamic_conpet` with a classifier head (`--task_type seq_cls`) in every task's adapter"
    config_class: ClassVar[type[DynamicConpetConfig]] = DynamicConpetClsConfig
    support: ClassVar[Support] = CLASSIFIER_SUPPORT

    config: DynamicConpetClsConfig

    def __init__(self, config: DynamicConpetClsConfig) -> None:
        super().__init__(config)
        self._own: Tensor | None = None
        self._seen: Tensor | None = None
        self._rows: Tensor | None = None

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        refuse_images(self.name, ctx.task, rows)
        return self.classes.labelled(ctx.task, rows)

    # --- the expert --------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        """A head that begins anew: small rows for the task's classes, zeros for all others, which never learn."""
        from swift_cl.methods._heads import HEAD, first_rows, head_of, make_head

        check_plain_lora(self.name, (name for name in ctx.parameters if not name.startswith(f"{HEAD}.")))
        head, own = head_of(model), self.classes.of(ctx.task)
        if head.out_features != len(self.classes):
            raise UserError(
                f"--num_labels is {head.out_features}, --dynamic_conpet_cls_labels has {len(self.classes)} classes"
            )
        make_head(head, None, [number for number in range(len(self.classes)) if number not in own])
        rows = torch.zeros(len(self.classes), head.in_features)
        rows[own] = first_rows(len(own), head.in_features, False, seed32(self.name, ctx.seed, ctx.task))
        copy_into(head.weight, rows)
        return model

    def train_begin(self, ctx: TaskContext) -> None:
        if ctx.earlier:
            before = ctx.previous_state().meta["settings"]
            for key in SAME_FOR_ALL:
                had, now = before[key], getattr(self.config, key)
                if key == "labels":
                    had, now = parse_labels(had, "labels").tasks, self.classes.tasks
                if had != now:
                    raise UserError(f"--{self.name}_{key} is {now!r}, but the stage before was trained with {had!r}")
        self._own = self._mask([ctx.task]).to(ctx.device)
        self._seen = self._mask([*(stage.task for stage in ctx.earlier), ctx.task]).to(ctx.device)

    def _mask(self, tasks: Sequence[str]) -> "Tensor":
        """[classes], true for those of the tasks."""
        mask = torch.zeros(len(self.classes), dtype=torch.bool)
        mask[[number for task in tasks for number in self.classes.of(task)]] = True
        return mask

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        """The cross-entropy is a mean over the rows of the step: of all micro-batches and ranks."""
        count = torch.tensor(float(sum(len(batch["labels"]) for batch in batches)), device=ctx.device)
        self._rows = ctx.all_reduce_sum(count)

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        """The right expert is chosen (teacher forcing), so the others' logits are the constant."""
        from swift_cl.methods._heads import class_loss, expert_logits

        assert self._own is not None
        assert self._seen is not None
        assert self._rows is not None
        logits = expert_logits(outputs.logits, self._own, self.config.null_logit)
        return ctx.window_mean(class_loss(logits, inputs["labels"], self._seen), self._rows)

    # --- end and inference -------------------------------------------------------------------------------------------

    def end_task(self, ctx: TaskContext) -> MethodState:
        state = super().end_task(ctx)
        table = [
            {"class": label, "id": number, "task": task}
            for task in self.classes.tasks
            for number, label in zip(self.classes.of(task), self.classes.tasks[task], strict=True)
        ]
        return MethodState(state.tensors, {**state.meta, "classes": table}, state.rows)

    def export_files(self, ctx: TaskContext) -> dict[str, Any]:
        """The names of the classes, which of them this expert knows, and the logit of the others."""
        own = self.classes.of(ctx.task)
        return {
            CLASSES_FILE: {
                "labels": list(self.classes.labels),
                "visible": own,
                "elsewhere": self.config.null_logit,
            }
        }

    def needs_task_id(self) -> bool:
        return self.config.scenario == "til"
