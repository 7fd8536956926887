"""The method contract: what a continual-learning method may do, and when.

A method is one class with one config dataclass, in one file. The hooks, in the order in which they run for one task:

    prepare_task(ctx, rows)        rank 0 only, before training: the rows to train on (replay mixes old ones in)
    batch_order(ctx, n, epoch)     every rank, before each epoch: the order of those rows, None for the Trainer's own
    prepare_model(ctx, model)      after the tuner is built, before the optimizer: adapters to add, freeze, merge
    train_begin(ctx)               every rank, with the final model: load the state of earlier tasks, check it
      window(ctx, batches)         once per optimizer step, before its micro-batches: counts over the whole window
      forward(ctx, inputs)         once per micro-batch: a context around its forward
      loss(ctx, model, inputs, loss, outputs)   once per micro-batch: returns the extra term to add, or None
      gradients(ctx, grads)        once per optimizer step, on reduced and unscaled gradients, before clipping
      after_step(ctx)              once per applied optimizer step: averages of weights
      checkpoint_state(ctx)        with every checkpoint: what a resumed run needs (restore_checkpoint gets it back)
    train_end(ctx)                 every rank, after the last step: statistics that `export` needs
    export(ctx, tensors)           rank 0: the weights that are kept, served, and continued by the next task
    export_config(ctx, config)     rank 0: the adapter_config.json that goes with them
    export_files(ctx)              rank 0: further JSON files beside them
    end_task(ctx)                  every rank, model still alive: the state that the next task needs
    candidates(ctx)                rank 0, for methods that choose at inference: the adapters the stage answers with
    route(ctx, requests)           only for those, in a process of its own: an adapter for each question of a batch

A method never asks which engine runs it: gradients, weights and reductions come from `TaskContext`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.io import MethodState
from swift_cl.methods._context import EarlierTask as EarlierTask
from swift_cl.methods._context import Gradients as Gradients
from swift_cl.methods._context import TaskContext as TaskContext
from swift_cl.methods._context import TrainingRow as TrainingRow
from swift_cl.methods._phase import Phase as Phase
from swift_cl.methods._routing import Candidate, Route, RouteContext, RouteRequest
from swift_cl.methods._support import Support as Support
from swift_cl.settings import Settings, flags_of_settings
from swift_cl.settings import setting as setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class MethodConfig(Settings):
    """Base of the methods' config dataclasses; see `Settings`."""


class Method:
    """Base of all methods; every hook does nothing unless overridden.

    Class attributes:
        name: the value of `--cl_method` and the prefix of its flags.
        title, summary, cost, paper: for listings and pages; `summary` says what it does, `cost` what a step costs over
            plain LoRA. They are Markdown, without a `|`.
        config_class: its config dataclass.
        support: what it supports.
        needs_rows: uses the rows as data (refuses streaming data sets).
        needs_logits: reads the model's logits in `loss`.
        replaces_loss: what `loss` returns is the whole loss of the micro-batch, not a term to add.
        classifies: answers are classes, known beforehand; the flags `<name>_labels` and `<name>_scenario` say which,
            and `swift-cl run` sets them from the benchmark.
        starts_fresh: every stage begins with a new adapter (or, fully fine-tuned, the base model), not with the weights
            of the stage before.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    config_class: ClassVar[type[MethodConfig]] = MethodConfig
    support: ClassVar[Support] = Support()
    needs_rows: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    replaces_loss: ClassVar[bool] = False
    starts_fresh: ClassVar[bool] = False
    classifies: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def supports(self) -> Support:
        """What this configuration supports: `support`, narrowed where a setting excludes something."""
        return self.support

    def required_flags(self) -> Mapping[str, str]:
        """ms-swift flags that this configuration needs: set where they are not given, refused where they differ."""
        return {}

    def weighs_tokens(self) -> bool:
        """Whether a loss of its own (`replaces_loss`) counts `ctx.token_weights`; else a `--loss_scale` with weights is
        refused."""
        return False

    def phases(self, first_task: bool) -> Sequence[Phase]:
        """The trainings that a stage consists of; the last one is its own, whose end is the stage's.

        What those before it trained is in `ctx.phases`, and is deleted after the stage unless `keeps_phases`.
        """
        return (Phase(""),)

    def keeps_phases(self) -> bool:
        """Whether the folders of the phases before the last stay after the stage."""
        return False

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        """The rows to train on. Runs on rank 0 before the model is prepared (`ctx.model` is not there yet)."""
        return rows

    def batch_order(self, ctx: TaskContext, n_rows: int, epoch: int) -> Sequence[int] | None:
        """A permutation of the rows that `prepare_task` returned, for one epoch; None for the Trainer's own shuffle.

        Every `ctx.global_batch` consecutive rows of it form one optimizer step. `n_rows` is the number of rows that
        the Trainer really has; a method that needs all of them refuses a smaller number.
        """
        return None

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        """Add, freeze or set parts of the model; `ctx.parameters` are those that the tuner trains."""
        return model

    def train_begin(self, ctx: TaskContext) -> None:
        """Load the state of earlier tasks and check that it fits."""

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        """See all micro-batches of the coming optimizer step."""

    def forward(self, ctx: TaskContext, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Entered for the forward of a micro-batch in training, with its inputs; `ctx.channels` are its rows'."""
        return nullcontext()

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        """An extra term for this micro-batch, scaled by `ctx.token_mean`; None for no term."""
        return None

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        """Read or change the gradient of this optimizer step."""

    def after_step(self, ctx: TaskContext) -> None:
        """Runs after an optimizer step was applied (not after one that the loss scaler skipped)."""

    def checkpoint_state(self, ctx: TaskContext) -> MethodState | None:
        """What must be stored with a checkpoint so that a resumed run equals an uninterrupted one."""
        return None

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        """Take back what `checkpoint_state` stored; called after `train_begin`."""

    def train_end(self, ctx: TaskContext) -> None:
        """Runs once the weights are final, before `export`: what is kept may depend on passes over the data."""

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        """State for the next task. Runs on every rank; what rank 0 returns is written."""
        return None

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """The weights to keep, by the names of `ctx.parameters`, without those not to be kept; unchanged by default."""
        return tensors

    def export_config(self, ctx: TaskContext, config: dict[str, Any]) -> dict[str, Any]:
        """The content of the kept adapter's adapter_config.json; unchanged by default."""
        return config

    def export_files(self, ctx: TaskContext) -> dict[str, Any]:
        """Further files beside the kept weights: JSON values by file name; none by default."""
        return {}

    # --- at inference ------------------------------------------------------------------------------------------------

    def routes(self) -> bool:
        """Whether this configuration chooses an adapter for every question instead of answering with the stage's."""
        return type(self).route is not Method.route

    def needs_task_id(self) -> bool:
        """Whether the question's task must be given at inference. Tables then say so, and `route` is not called."""
        return False

    def candidates(self, ctx: TaskContext) -> list[Candidate]:
        """The adapters that the stage answers with, after `end_task`; by default one a task, each stage's own."""
        return [Candidate(stage.task, (stage.task,), stage.weights_dir) for stage in (*ctx.earlier, ctx.this_stage)]

    def route(self, ctx: RouteContext, requests: Sequence[RouteRequest]) -> Sequence[Route]:
        """One choice a request, in their order. There are at least two candidates."""
        raise NotImplementedError(f"method '{self.name}' does not route")


def flags_of(method: type[Method]) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(flag name without dashes, config field) of a method."""
    return flags_of_settings(method.name, method.config_class)
