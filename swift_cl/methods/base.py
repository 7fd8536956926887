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
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from swift_cl.generation.engine import Engine
from swift_cl.io import MethodState
from swift_cl.methods._routing import Candidate, Route, RouteContext, RouteRequest
from swift_cl.methods._support import Support as Support
from swift_cl.settings import Settings, flags_of_settings
from swift_cl.settings import setting as setting

if TYPE_CHECKING:
    from torch import Tensor, nn

TrainingRow = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """One of the trainings of a stage, on the same rows and in the same command.

    Attributes:
        name: unique within the stage; `ctx.phase` while it runs.
        flags: what differs from the stage's own flags. A phase before the last may name another `cl_method` and what
            that one needs: it is then a first stage of that method, from the base model, and gets no flag of this one.
    """

    name: str
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def other_method(self) -> bool:
        """Whether it is a stage of another method."""
        return "cl_method" in self.flags


@dataclass
class MethodConfig(Settings):
    """Base of the methods' config dataclasses; see `Settings`."""


class Gradients(Protocol):
    """Gradients of one optimizer step: reduced over ranks and micro-batches, without loss scale, before clipping."""

    @property
    def names(self) -> list[str]:
        """Names of the trained parameters, the same and in the same order on every rank."""

    def __getitem__(self, name: str) -> "Tensor":
        """The full gradient in fp32; read-only."""

    def __setitem__(self, name: str, value: "Tensor") -> None:
        """Replace the gradient; what is not set stays bit-identical."""

    def add_part(self, name: str, part: "Tensor") -> None:
        """Add to this process's part of a gradient; `part` is cut as `TaskContext.weight_parts` are. Sends nothing."""

    def flat(self) -> "Tensor":
        """All gradients as one fp32 vector, in the order of `names`."""

    def set_flat(self, vector: "Tensor") -> None:
        """Replace all gradients from one vector."""


@dataclass(frozen=True)
class EarlierTask:
    """A finished stage that this task builds on."""

    task: str
    dir: Path
    weights_dir: Path
    state_dir: Path


class TaskContext(Protocol):
    """What a method sees of the run.

    Attributes:
        task: name of the current task.
        earlier: finished stages, oldest first (for a lone `swift-cl sft` with `--cl_previous`, found by following
            each stage's `started_from`).
        seed: the run's seed.
        rank, world_size: of the data-parallel group.
        device: where the model lives.
        system: the stage's system prompt, None for the template's default.
        this_stage: the current task's own folders; its weights are there from `end_task` on.
        model: the model as transformers sees it, unwrapped (a PeftModel for LoRA).
        module_for_forward: the unwrapped module to run extra forwards on (same weights, no reducer hooks).
        parameters: trained parameters by name, without wrapper prefixes and adapter name.
        step: number of optimizer steps done.
        max_steps: number of optimizer steps of the task.
        micro_batch: rows per device and forward in training; a method's own forwards take no more.
        global_batch: rows of one optimizer step, over all ranks and accumulation steps (known in `prepare_task` too).
        schedule: what the learning rate's schedule makes of it in this step, 1 for all of it.
        is_logging_step: whether values logged now will be shown.
        channels: in `forward` and `loss`, the column `channel` of the micro-batch's rows; None where no row has one.
        token_weights: in `loss`, the weight of every label (`--loss_scale`), [batch, length]; None where all count 1.
    """

    @property
    def task(self) -> str: ...
    @property
    def earlier(self) -> list[EarlierTask]: ...
    @property
    def seed(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> Any: ...
    @property
    def system(self) -> str | None: ...
    @property
    def this_stage(self) -> EarlierTask: ...
    @property
    def model(self) -> Any: ...
    @property
    def parameters(self) -> "Mapping[str, nn.Parameter]": ...
    @property
    def step(self) -> int: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def schedule(self) -> float: ...
    @property
    def is_logging_step(self) -> bool: ...
    @property
    def channels(self) -> Sequence[str | None] | None: ...
    @property
    def token_weights(self) -> "Tensor | None": ...

    @property
    def task_index(self) -> int:
        """0-based position of the current task."""

    @property
    def module_for_forward(self) -> Any: ...

    def gradients_of(self, total: "Tensor", names: Sequence[str]) -> "Sequence[Tensor | None]":
        """Gradients of a scalar that came out of `module_for_forward`, of this rank alone; None where unused.

        Every rank must call it equally often: several engines exchange weights in a backward too.
        """

    def weights(self) -> "dict[str, Tensor]":
        """Full fp32 weights of the trained parameters; may alias the live ones, so never write to them."""

    def forward_with(self, held: "Mapping[str, Tensor]", inputs: Mapping[str, Any]) -> Any:
        """The model's outputs with other values of trained parameters, without gradient; every rank must call it.

        Args:
            held: by name, as `swift_cl.distributed.held` and `part_of` give them.
        """

    def live_weights(self) -> "dict[str, Tensor]":
        """Full weights as the forward has them (under DeepSpeed in low precision), in fp32; sends something only where
        no process holds them whole (ZeRO-3, FSDP2)."""

    def weight_parts(self) -> "dict[str, Tensor]":
        """fp32 weights of what this process's optimizer steps on, for work that is elementwise: under ZeRO and FSDP2 a
        part (a parameter may be missing), else all. Sends nothing."""

    def parts_of(self, full: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Full tensors, by parameter, cut as `weight_parts` are."""

    def sum_of_parts(self, total: "Tensor") -> "Tensor":
        """A sum over this process's parts as the sum over all; every rank must call it."""

    def training_rows(self) -> list[TrainingRow]:
        """This task's own rows (no replayed ones) in ms-swift's messages format, system prompt in place."""

    def encode(self, rows: Sequence[TrainingRow]) -> list[dict[str, Any]]:
        """Rows through the training template; a row that the template would drop gives an empty dict."""

    def encode_prompts(self, prompts: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        """Token ids of prompts as they are asked at inference: generation prompt at the end, no answer."""

    @property
    def stop_tokens(self) -> list[int]:
        """Ids of the tokens that end an answer."""

    def collate(self, encoded: Sequence[dict[str, Any]]) -> "dict[str, Tensor]":
        """Encoded rows as one padded batch of model inputs (with `labels`) on the device."""

    def engine(self, weights: Path | None, backend: str) -> AbstractContextManager[Engine]:
        """Generation, in `prepare_task` only: the base model with an earlier stage's weights, None for it alone.

        Args:
            weights: `weights_dir` of an earlier task.
            backend: one of `swift_cl.generation.engine.BACKENDS`.
        """

    @property
    def phase(self) -> str:
        """Name of the phase that runs (`Method.phases`)."""

    @property
    def phases(self) -> Mapping[str, Path]:
        """The adapters of the phases before this one, by name."""

    @property
    def generated_dir(self) -> Path:
        """Folder for the files of this stage's generation; a resumed stage finds them there again."""

    def statistics_mode(self) -> AbstractContextManager[None]:
        """Dropout off, checkpointing in the form that `torch.autograd.grad` allows, under the Trainer's autocast."""

    def token_mean(self, total: "Tensor", count: "Tensor | int") -> "Tensor":
        """Scale a sum over the micro-batch's label tokens like the Trainer's cross-entropy (rule R1).

        Args:
            total: sum over tokens of a per-token term.
            count: number of label tokens in the micro-batch; used when the Trainer gives no window count.
        """

    def window_mean(self, total: "Tensor", window_count: "Tensor") -> "Tensor":
        """As `token_mean`, for another token set whose global count over the window is `window_count`."""

    def all_reduce_sum(self, tensor: "Tensor") -> "Tensor":
        """Sum over ranks, in place where there are several; the same tensor otherwise."""

    def previous_state(self) -> MethodState:
        """The state that this method wrote at the end of the previous task.

        Raises:
            UserError: it is missing or damaged, with the file named.
        """

    def log(self, name: str, value: "Tensor | float") -> None:
        """Show a value under `train/<name>`: averaged between logging steps, no device synchronisation here."""

    def record(self, name: str, value: Any) -> None:
        """Write a JSON value to `<stage>/cl_state/<method>.<name>.json` (rank 0): what was done, for people to read."""

    def notice(self, message: str) -> None:
        """One warning line, on rank 0."""


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
