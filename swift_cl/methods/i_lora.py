"""i_lora: Interpolation-based LoRA, a slow average of the weights that memory rows are held to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.distributed import copy_into
from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import AdapterSwitch, check_plain_lora, frozen_parameters, load_frozen_adapter
from swift_cl.methods._draws import permutation
from swift_cl.methods._hidden_states import HiddenStates
from swift_cl.methods._row_store import RowStore, SeenTask, StoredRow, exact, round_half_up, usable_rows
from swift_cl.methods._state import check_shapes, pack, shapes_of, unpack
from swift_cl.methods.base import Method, MethodConfig, Support, TaskContext, TrainingRow, setting
from swift_cl.methods.replay import draw, order_for_batches, rows_for_batches

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

SLOW = "slow"
# The column that ms-swift carries through template and collator; here it says which rows are memory.
ROW_MARK = "channel"
MEMORY, CURRENT = "i_lora_memory", "i_lora_current"


@dataclass
class ILoraConfig(MethodConfig):
    """The average, the term that holds the trained weights to it, and the memory."""

    lambda_: float = setting(0.999, "Share of the slow weights that an update keeps, in [0, 1).")
    gamma: float = setting(1.0, "Weight of the distance between fast and slow representations of memory rows, >= 0.")
    layers: str = setting(
        "last",
        "Hidden states that are compared: 'last' (after the final norm), 'all', or numbers separated by commas, where "
        "0 is the embedding and -1 the last.",
    )
    target: str = setting(
        "slow",
        "What the fast representation is drawn to: 'slow', or 'max' as in the released code (the larger of the two, "
        "so that only what lies below the slow one is moved).",
        ("slow", "max"),
    )
    buffer_size: int = setting(500, "Rows in the memory, shared equally by the tasks, >= 1.")
    mem_ratio: float = setting(0.25, "Memory rows per current row in every full global batch, > 0.")
    infer: str = setting("slow", "Which weights are the stage's adapter; both are kept.", ("slow", "fast"))
    seed: int = setting(0, "Seed of what is stored and drawn, >= 0.")

    def validate(self) -> None:
        if not 0 <= self.lambda_ < 1:
            self.fail("i_lora", "lambda_", "a number in [0, 1)")
        if not 0 <= self.gamma < math.inf:
            self.fail("i_lora", "gamma", "a number >= 0")
        if not 0 < self.mem_ratio < math.inf:
            self.fail("i_lora", "mem_ratio", "a number > 0")
        for name, least in (("buffer_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                self.fail("i_lora", name, f"{least} or more")
        self.layer_numbers()

    def layer_numbers(self) -> list[int] | None:
        """The chosen hidden states, None for all of them."""
        if self.layers == "all":
            return None
        try:
            return [-1] if self.layers == "last" else [int(part) for part in self.layers.split(",")]
        except ValueError:
            self.fail("i_lora", "layers", "'last', 'all', or whole numbers separated by commas")
            raise AssertionError from None


class ILora(Method):
    """theta_l <- lambda theta_l + (1 - lambda) theta_w after every step; L = CE(D_t and M) + gamma |h_w - h_l|^2 on M.

    The fast weights theta_w are trained and continued by the next task; the slow ones travel beside them.
    """

    name: ClassVar[str] = "i_lora"
    title: ClassVar[str] = "Interpolation-based LoRA (I-LoRA)"
    summary: ClassVar[str] = "a slow average of the weights that memory rows are held to"
    cost: ClassVar[str] = "1 forward on memory rows"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.18865"
    config_class: ClassVar[type[MethodConfig]] = ILoraConfig
    support: ClassVar[Support] = Support(
        tuners=("lora",), full_deepspeed=(), zero0_low_precision=False, packing=False, sequence_parallel=False
    )
    needs_rows: ClassVar[bool] = True

    config: ILoraConfig

    def __init__(self, config: ILoraConfig) -> None:
        super().__init__(config)
        self._slow: dict[str, Tensor] = {}  # fp32, by name of the trained twin
        self._updates = 0
        self._frozen: dict[str, Any] = {}  # the adapter 'slow', empty in the first task
        self._switch: AdapterSwitch | None = None
        self._states: HiddenStates | None = None
        self._marks: list[list[bool]] = []  # of the coming micro-batches: which rows are memory
        self._window_count: Tensor | None = None

    def required_flags(self) -> Mapping[str, str]:
        # A padding-free collator joins the rows of a micro-batch into one.
        return {"padding_free": "false"}

    # --- data --------------------------------------------------------------------------------------------------------

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        """Current rows and drawn memory rows, each marked as what it is; the first task's rows stay as they are."""
        share = self._share_of_batch(ctx)
        store = RowStore.load(ctx, self.name)
        if not ctx.earlier:
            return rows
        if not store.rows:
            raise UserError(f"{ctx.earlier[-1].state_dir / self.name}.json: the memory is empty")
        drawn = draw(store, rows_for_batches(len(rows), ctx.global_batch, share), self.config.seed, ctx.task)
        ctx.record(
            "memory",
            {
                "schema_version": 1,
                "task": ctx.task,
                "current_rows": len(rows),
                "memory_rows": len(drawn),
                "by_task": {seen.task: sum(row.task == seen.task for row in drawn) for seen in store.seen},
                "rows": [{"id": row.id, "task": row.task} for row in drawn],
            },
        )
        current = [{**row, ROW_MARK: row.get(ROW_MARK) or CURRENT} for row in rows]
        return current + [{**stored.row, ROW_MARK: MEMORY} for stored in drawn]

    def batch_order(self, ctx: TaskContext, n_rows: int, epoch: int) -> list[int] | None:
        """Equally many memory rows in every full global batch."""
        if not ctx.earlier:
            return None
        current, share = len(ctx.training_rows()), self._share_of_batch(ctx)
        memory = rows_for_batches(current, ctx.global_batch, share)
        if n_rows != current + memory:
            raise UserError(
                f"method 'i_lora' laid out {current + memory} rows, but the training data holds {n_rows}: the template "
                "dropped some; raise --max_length"
            )
        return order_for_batches(current, memory, ctx.global_batch, share, self.config.seed, ctx.task, epoch)

    def _share_of_batch(self, ctx: TaskContext) -> int:
        ratio, batch = exact(self.config.mem_ratio), ctx.global_batch
        share = round_half_up(batch * ratio / (1 + ratio))
        if not 0 < share < batch:
            raise UserError(
                f"--i_lora_mem_ratio {self.config.mem_ratio}: a global batch of {batch} rows would hold {share} memory "
                f"rows, allowed: 1 to {batch - 1}; change the ratio or the batch"
            )
        return share

    # --- the model ---------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        check_plain_lora(self.name, ctx.parameters)
        if not ctx.earlier:
            return model
        state = ctx.previous_state()
        check_shapes(self.name, state.meta["parameters"], shapes_of(ctx.parameters))
        for name, trained in unpack(state.tensors, "trained").items():
            with torch.no_grad():
                ctx.parameters[name].copy_(trained)
        if self.config.gamma > 0:
            load_frozen_adapter(model, ctx.earlier[-1].weights_dir, SLOW)
            self._switch = AdapterSwitch(model)
            self._states = HiddenStates(model, self.config.layer_numbers())
        return model

    def train_begin(self, ctx: TaskContext) -> None:
        weights = ctx.weights()
        stored = unpack(ctx.previous_state().tensors, "slow") if ctx.earlier else weights
        self._slow = {name: stored[name].to(weight.device, copy=True) for name, weight in weights.items()}
        if self._switch is not None:
            self._frozen = frozen_parameters(ctx.module_for_forward, SLOW)
            assert self._frozen.keys() == self._slow.keys()
            self._show_slow()

    def _show_slow(self) -> None:
        """Put the slow weights into the adapter that is run; in its dtype, while the average itself stays fp32."""
        for name, parameter in self._frozen.items():
            copy_into(parameter, self._slow[name])

    # --- training ----------------------------------------------------------------------------------------------------

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        if self._switch is None:
            return
        marks = [[mark == MEMORY for mark in batch.get(ROW_MARK) or [None] * len(batch["labels"])] for batch in batches]
        counts = [_tokens(batch, mark).sum() for batch, mark in zip(batches, marks, strict=True)]
        total = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long)
        self._window_count = ctx.all_reduce_sum(total.to(ctx.device)).clamp(min=1)
        self._marks = marks

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        if self._switch is None:
            return None
        assert self._states is not None
        assert self._window_count is not None
        fast, marks = self._states.take(), self._marks.pop(0)
        rows = [number for number, mark in enumerate(marks) if mark]
        if not rows and ctx.world_size == 1:
            return None
        # With several ranks even one without memory rows runs a forward: under ZeRO-3 it needs all of them.
        chosen = rows or [0]
        with torch.no_grad(), ctx.statistics_mode(), self._switch.active(SLOW):
            given, whole = _of_rows(inputs, chosen)
            ctx.module_for_forward(**given)
        slow = self._states.take()
        tokens = _tokens(inputs, marks)[chosen]
        total = fast[0].new_zeros((), dtype=torch.float32)
        for ours, theirs in zip(fast, slow, strict=True):
            theirs = theirs[chosen] if whole else theirs
            total = total + self.distance(ours[chosen], theirs, tokens)
        count = int(tokens.sum())
        ctx.log("i_lora_mse", total.detach() / len(fast) / max(1, count), count)
        # Rule R1 for another token set than the labels: its own count, over micro-batches and ranks.
        return self.config.gamma * ctx.window_mean(total / len(fast), self._window_count)

    def distance(self, fast: "Tensor", slow: "Tensor", tokens: "Tensor") -> "Tensor":
        """Sum over tokens of the mean square over the width, fp32.

        Args:
            fast, slow: [rows, length, width]; no gradient flows into `slow`.
            tokens: [rows, length], True where a token counts.
        """
        if fast.shape[:2] != tokens.shape:
            raise UserError(
                f"method 'i_lora' needs one hidden state a token, found {tuple(fast.shape[:2])} states for "
                f"{tuple(tokens.shape)} tokens (an encoder-decoder model has two sequences)"
            )
        ours, theirs = fast.float(), slow.detach().float()
        if self.config.target == "max":
            theirs = torch.maximum(ours.detach(), theirs)
        return (ours - theirs).square().mean(dim=-1).masked_fill(~tokens, 0.0).sum()

    def after_step(self, ctx: TaskContext) -> None:
        self._updates += 1
        weights = ctx.weights()
        live = [weights[name] for name in self._slow]
        torch._foreach_lerp_(list(self._slow.values()), live, 1 - self.inertia(ctx, self._updates))
        self._show_slow()

    def inertia(self, ctx: TaskContext, update: int) -> float:
        """lambda of the update with this number (from 1); only the first task's slow weights have to warm up."""
        return self.config.lambda_ if ctx.earlier else min(1 - 1 / (update + 1), self.config.lambda_)

    def checkpoint_state(self, ctx: TaskContext) -> MethodState:
        meta = {"parameters": shapes_of(self._slow), "updates": self._updates}
        return MethodState(pack(slow=self._slow), meta)

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        check_shapes(self.name, state.meta["parameters"], shapes_of(self._slow))
        slow = unpack(state.tensors, "slow")
        self._slow = {name: slow[name].to(old.device, copy=True) for name, old in self._slow.items()}
        self._updates = state.meta["updates"]
        self._show_slow()

    # --- what is kept ------------------------------------------------------------------------------------------------

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        return {**tensors, **self._slow} if self.config.infer == "slow" else tensors

    def end_task(self, ctx: TaskContext) -> MethodState:
        if self._states is not None:
            self._states.remove()
        rows = ctx.training_rows()
        store = RowStore.load(ctx, self.name)
        order = permutation(len(rows), self.config.seed, ctx.task, "store")
        usable, dropped = usable_rows(ctx, rows, order, self.config.buffer_size)
        if not usable:
            raise UserError(f"task '{ctx.task}': no row fits the training template, so there is none to remember")
        shares = store.shares(self.config.buffer_size, True, len(usable))
        store.add(SeenTask(ctx.task, len(rows), dropped), [StoredRow.of(rows[i], ctx.task) for i in usable], shares)
        store.settings = {"strategy": "random", "budget": "total", "buffer_size": self.config.buffer_size}
        state = store.state()
        weights = ctx.weights()
        state.tensors = {name: tensor.cpu() for name, tensor in pack(slow=self._slow, trained=weights).items()}
        state.meta |= {"parameters": shapes_of(weights), "updates": self._updates}
        return state


def _tokens(batch: Mapping[str, Any], marks: Sequence[bool]) -> "Tensor":
    """Which tokens of the rows marked are no padding, [rows, length]."""
    ids, attention = batch["input_ids"], batch.get("attention_mask")
    real = attention.bool() if attention is not None and attention.shape == ids.shape else torch.ones_like(ids).bool()
    return real & torch.tensor(marks, device=ids.device).unsqueeze(1)


def _of_rows(inputs: Mapping[str, Any], rows: Sequence[int]) -> tuple[dict[str, Any], bool]:
    """(model inputs of these rows alone, or of all of them, whether it is all).

    Images of several rows stand in one tensor, which cannot be cut by rows.
    """
    from swift_cl.methods._frozen_teacher import rows_of_batch

    whole = any(key.startswith(("pixel_", "image_", "video_", "audio_")) for key in inputs)
    given = inputs if whole else rows_of_batch(inputs, torch.tensor(rows, device=inputs["labels"].device))
    return {key: value for key, value in given.items() if key not in ("labels", "logits_to_keep")}, whole
