"""What a method sees of a run: its context, the gradients of a step, the stages before."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from swift_cl.generation.engine import Engine
from swift_cl.io import MethodState

if TYPE_CHECKING:
    from torch import Tensor, nn

TrainingRow = dict[str, Any]


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

    def log(self, name: str, value: "Tensor | float", weight: int = 1) -> None:
        """Show a value under `train/<name>`: averaged over ranks, micro-batches and steps between logging steps.

        Args:
            weight: in that average, for a mean over tokens their number: micro-batches and ranks have unlike ones.
        """

    def record(self, name: str, value: Any) -> None:
        """Write a JSON value to `<stage>/cl_state/<method>.<name>.json` (rank 0): what was done, for people to read."""

    def notice(self, message: str) -> None:
        """One warning line, on rank 0."""
