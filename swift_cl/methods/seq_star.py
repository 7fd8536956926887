"""seq_star: a classifier head on a backbone that is frozen after a warm-up; the rows of old classes are frozen too."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.distributed import copy_into, full_shape
from swift_cl.errors import RunFailure, UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import stored_adapter
from swift_cl.methods._classes import CLASSIFIER_SUPPORT, Classifying, parse_labels, refuse_images
from swift_cl.methods._draws import seed32
from swift_cl.methods.base import Method, MethodConfig, Phase, Support, TaskContext, TrainingRow, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

WARMUP = "warmup"
CLASSES_FILE = "classes.json"
SAME_FOR_ALL = ("labels", "head", "cosine_scale", "scenario", "preallocate")
"""Settings that every stage of a run shares."""


@dataclass
class SeqStarConfig(MethodConfig):
    """Flags of `seq_star`."""

    labels: str = setting(
        "",
        'The labels of all tasks in their order, {"task": ["label", ...], ...}: JSON text, or a JSON file. '
        "`swift-cl run` sets it from a benchmark whose scenario is a classification.",
    )
    scenario: str = setting(
        "cil",
        "'cil' (class-incremental) takes the softmax over the classes of all tasks so far, 'til' (task-incremental) "
        "over those of the row's own task. `swift-cl run` sets it from the benchmark.",
        ("cil", "til"),
    )
    head: str = setting(
        "cosine", "'cosine' compares directions (without old data), 'linear' is an inner product.", ("cosine", "linear")
    )
    cosine_scale: float = setting(16.0, "Factor s of the cosine, > 0; only with head 'cosine'.")
    warmup_epochs: float = setting(1.0, "Epochs in which the first task trains the backbone, >= 0; 0 for none.")
    warmup_target: str = setting(
        "lm",
        "What the warm-up learns: 'lm' the answer as text (causal models), 'ce' the classes (with the head).",
        ("lm", "ce"),
    )
    warmup_lr: float = setting(1e-4, "Learning rate of the warm-up, > 0; --learning_rate is the head's.")
    freeze_backbone: bool = setting(True, "Freeze the adapter after the warm-up; false trains it with the head.")
    freeze_old_heads: bool = setting(True, "Leave the rows of earlier tasks' classes as they are.")
    preallocate: bool = setting(False, "Let the classes of later tasks take part in the softmax from the start.")

    def validate(self) -> None:
        if not 0 < self.cosine_scale < math.inf:
            self.fail("seq_star", "cosine_scale", "a number > 0")
        if self.head != "cosine" and self.cosine_scale != SeqStarConfig.cosine_scale:
            self.fail("seq_star", "cosine_scale", "only with --seq_star_head cosine")
        if not 0 <= self.warmup_epochs < math.inf:
            self.fail("seq_star", "warmup_epochs", "a number >= 0")
        if not 0 < self.warmup_lr < math.inf:
            self.fail("seq_star", "warmup_lr", "a number > 0")
        if self.scenario == "til" and self.preallocate:
            self.fail("seq_star", "preallocate", "false with --seq_star_scenario til: later tasks have no rows then")
        if self.labels:
            parse_labels(self.labels, "--seq_star_labels")

    @property
    def scale(self) -> float | None:
        """s of the cosine head; None for the linear one."""
        return self.cosine_scale if self.head == "cosine" else None


class SeqStar(Classifying, Method):
    """CE over the visible classes; backbone fixed after the warm-up, rows of old classes fixed after their task."""

    name: ClassVar[str] = "seq_star"
    title: ClassVar[str] = "SEQ*: frozen backbone, frozen old heads"
    summary: ClassVar[str] = (
        "a classifier head (`--task_type seq_cls`) on a backbone that is frozen after a warm-up; old "
        "classes' rows are frozen too"
    )
    cost: ClassVar[str] = "head only: no backward through the backbone"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.07887"
    config_class: ClassVar[type[MethodConfig]] = SeqStarConfig
    support: ClassVar[Support] = CLASSIFIER_SUPPORT
    needs_rows: ClassVar[bool] = True

    config: SeqStarConfig

    def __init__(self, config: SeqStarConfig) -> None:
        super().__init__(config)
        self._visible: Tensor | None = None
        self._rows: Tensor | None = None
        self._before: Tensor | None = None

    def phases(self, first_task: bool) -> Sequence[Phase]:
        """The warm-up is a training of its own: what is trained never changes within one."""
        assert self.classes  # read here, before anything is loaded
        if not first_task or self.config.warmup_epochs == 0:
            return (Phase(""),)
        flags = {"num_train_epochs": str(self.config.warmup_epochs), "learning_rate": str(self.config.warmup_lr)}
        if self.config.warmup_target == "lm":
            flags |= {"cl_method": "seq", "task_type": "causal_lm"}
        return (Phase(WARMUP, flags), Phase(""))

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        refuse_images(self.name, ctx.task, rows)
        return self.classes.labelled(ctx.task, rows)

    # --- which classes ---------------------------------------------------------------------------------------------

    def visible(self, ctx: TaskContext) -> list[int]:
        """The classes that the softmax runs over."""
        own = self.classes.of(ctx.task)
        if self.config.scenario == "til":
            return own
        if self.config.preallocate:
            return list(range(len(self.classes)))
        return [*self._old(ctx), *own]

    def _old(self, ctx: TaskContext) -> list[int]:
        return [number for stage in ctx.earlier for number in self.classes.of(stage.task)]

    def _frozen(self, ctx: TaskContext) -> list[int]:
        return self._old(ctx) if self.config.freeze_old_heads else []

    # --- model -----------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        from swift_cl.methods._heads import first_rows, head_of, make_head

        head = head_of(model)
        if head.out_features != len(self.classes):
            raise UserError(f"--num_labels is {head.out_features}, --seq_star_labels has {len(self.classes)} classes")
        make_head(head, self.config.scale, self._frozen(ctx))
        if not ctx.earlier:
            rows = first_rows(
                len(self.classes), head.in_features, self.config.head == "cosine", seed32(self.name, ctx.seed)
            )
            copy_into(head.weight, rows)
        if WARMUP in ctx.phases:
            _load(model, stored_adapter(ctx.phases[WARMUP]))
        if self.config.freeze_backbone and ctx.phase != WARMUP:
            _freeze_all_but(model, head)
        return model

    def train_begin(self, ctx: TaskContext) -> None:
        if ctx.earlier:
            before = ctx.previous_state().meta["settings"]
            for key in SAME_FOR_ALL:
                had, now = before[key], getattr(self.config, key)
                if key == "labels":
                    had, now = parse_labels(had, "labels").tasks, self.classes.tasks
                if had != now:
                    raise UserError(f"--seq_star_{key} is {now!r}, but the stage before was trained with {had!r}")
        mask = torch.zeros(len(self.classes), dtype=torch.bool)
        mask[self.visible(ctx)] = True
        self._visible = mask.to(ctx.device)
        self._before = self._head(ctx)[self._frozen(ctx)].clone()

    @staticmethod
    def _head(ctx: TaskContext) -> "Tensor":
        """Rows of all classes, fp32; every rank must call it."""
        from swift_cl.methods._heads import head_of

        own = head_of(ctx.model).weight
        name = next(name for name, parameter in ctx.parameters.items() if parameter is own)
        return ctx.weights()[name]

    # --- loss ------------------------------------------------------------------------------------------------------

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        """The cross-entropy is a mean over the rows of the step: of all micro-batches and ranks."""
        count = torch.tensor(float(sum(len(batch["labels"]) for batch in batches)), device=ctx.device)
        self._rows = ctx.all_reduce_sum(count)

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        from swift_cl.methods._heads import class_loss

        assert self._visible is not None
        assert self._rows is not None
        return ctx.window_mean(class_loss(outputs.logits, inputs["labels"], self._visible), self._rows)

    # --- end -------------------------------------------------------------------------------------------------------

    def end_task(self, ctx: TaskContext) -> MethodState:
        assert self._before is not None
        if not torch.equal(self._before, self._head(ctx)[self._frozen(ctx)]):
            raise RunFailure("rows of the head that belong to earlier tasks have changed")
        visible = set(self.visible(ctx))
        table = [
            {"class": label, "id": number, "task": task, "visible": number in visible}
            for task in self.classes.tasks
            for number, label in zip(self.classes.of(task), self.classes.tasks[task], strict=True)
        ]
        return MethodState(meta={"classes": table})

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """The cosine head as a linear one that chooses the same class: the rows that learned get length 1."""
        if self.config.head != "cosine":
            return tensors
        frozen = self._frozen(ctx)
        changed = dict(tensors)
        for name, tensor in tensors.items():
            if name.startswith("score."):
                rows = torch.nn.functional.normalize(tensor.float(), dim=-1).to(tensor.dtype)
                rows[frozen] = tensor[frozen]
                changed[name] = rows
        return changed

    def export_files(self, ctx: TaskContext) -> dict[str, Any]:
        """The names of the classes, and which of them a question without labels is answered with."""
        seen = [*self._old(ctx), *self.classes.of(ctx.task)]
        return {CLASSES_FILE: {"labels": list(self.classes.labels), "visible": seen}}


def _load(model: Any, stored: "Mapping[str, Tensor]") -> None:
    """Put what the warm-up trained (the adapter, and with target 'ce' the head) in its place."""
    from peft import get_peft_model_state_dict

    live = get_peft_model_state_dict(model, save_embedding_layers=False)  # aliases of the live tensors
    for short, tensor in stored.items():
        name = f"base_model.model.{short}"
        if name not in live or full_shape(live[name]) != tensor.shape:
            raise RunFailure(f"tensor {name} of the warm-up has no place in the model")
        copy_into(live[name], tensor)


def _freeze_all_but(model: Any, head: Any) -> None:
    """Train the head alone, on the features that will be served: frozen layers drop nothing out."""
    own = set(head.parameters())
    for parameter in model.parameters():
        if parameter not in own:
            parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
