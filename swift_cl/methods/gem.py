"""gem: the gradient is projected so that no stored task's loss rises to first order (A-GEM with `--gem_mode agem`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.distributed import full_shape
from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.methods._adapters import is_peft
from swift_cl.methods._answers import IGNORED, predicted, predicted_tokens, unlabelled
from swift_cl.methods._draws import permutation
from swift_cl.methods._projection import FALLBACK_RIDGE, LARGEST_WEIGHT, agem_weight, gem_weights
from swift_cl.methods._row_store import RowStore, SeenTask, StoredRow, usable_rows
from swift_cl.methods._state import unpack
from swift_cl.methods.base import Gradients, Method, MethodConfig, Support, TaskContext, TrainingRow, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from swift_cl.methods._spread import Layout
else:
    from swift_cl.lazy import LazyModule

    torch = LazyModule("torch")

_POOLED = "all earlier tasks"


@dataclass
class GemConfig(MethodConfig):
    """What is remembered of each task, and how the gradient is kept from harming it."""

    mode: str = setting(
        "gem",
        "'gem' has one constraint per earlier task, 'agem' a single one on rows drawn from all earlier tasks.",
        choices=("gem", "agem"),
    )
    memory_size: int = setting(256, "Rows stored of each task, >= 1.")
    mem_batch: int = setting(
        8,
        "Memory rows per step over all ranks (gem: of each earlier task), >= 0; 0 = all of them, as in the paper; "
        "raised to the number of ranks if smaller.",
    )
    margin: float = setting(
        0.5, "Least weight of a memory gradient in a projection, >= 0; 0 = pure projection; no effect with agem."
    )
    eps: float = setting(
        1e-6, "Ridge of the quadratic program relative to the memory gradients' size, > 0; no effect with agem."
    )
    refresh_steps: int = setting(1, "Memory gradients are computed anew every so many steps, >= 1.")
    seed: int = setting(0, "Seed of what is stored and drawn, >= 0.")

    def validate(self) -> None:
        """Refuse values out of range."""
        for name, least in (("memory_size", 1), ("mem_batch", 0), ("refresh_steps", 1), ("seed", 0)):
            if getattr(self, name) < least:
                self.fail("gem", name, f"{least} or more")
        if not (self.margin >= 0 and math.isfinite(self.margin)):
            self.fail("gem", "margin", "0 or more")
        if not (self.eps > 0 and math.isfinite(self.eps)):
            self.fail("gem", "eps", "more than 0")


@dataclass(frozen=True)
class MemoryRow:
    """A row through the training template, and how many of its label tokens the model predicts."""

    encoded: dict[str, Any]
    tokens: int

    @classmethod
    def of(cls, encoded: dict[str, Any], module: Any = None) -> "MemoryRow":
        """Count the label tokens that `module` predicts."""
        return cls(encoded, predicted_tokens(module, encoded.get("labels", [])))


class Gem(Method):
    """g becomes z = argmin |g - z|^2 with z.g_k >= 0 for all k < t, where g_k = grad of the CE on task k's memory."""

    name: ClassVar[str] = "gem"
    title: ClassVar[str] = "Gradient Episodic Memory, Averaged GEM"
    summary: ClassVar[str] = (
        "projects the gradient so that no stored task's loss rises; `--gem_mode agem` for averaged GEM"
    )
    cost: ClassVar[str] = "1 pass a task (agem: 1)"
    paper: ClassVar[str] = "https://arxiv.org/abs/1706.08840"
    config_class: ClassVar[type[MethodConfig]] = GemConfig
    support: ClassVar[Support] = Support(
        tuners=("lora", "full", "moelora"), sequence_parallel=False, liger=False, encoder_decoder=True
    )
    needs_rows: ClassVar[bool] = True
    config: GemConfig

    def __init__(self, config: GemConfig) -> None:
        super().__init__(config)
        self._memories: dict[str, list[MemoryRow]] = {}
        self._layout: Layout | None = None
        self._gradients: list[Tensor] = []  # as the layout has them
        self._computed_at = -1
        self._before: Tensor | None = None

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        """Memory rows are never trained on; a missing memory is found here, before the model is loaded."""
        RowStore.load(ctx, self.name)
        return rows

    def train_begin(self, ctx: TaskContext) -> None:
        """Encode the memories."""
        if self.config.mode == "agem" and self.config.margin != GemConfig.margin:
            ctx.notice(f"--gem_margin {self.config.margin} has no effect with --gem_mode agem")
        if self.config.mode == "agem" and self.config.eps != GemConfig.eps:
            ctx.notice(f"--gem_eps {self.config.eps} has no effect with --gem_mode agem")
        store = RowStore.load(ctx, self.name)
        memories = {}
        for entry in store.seen:
            encoded = ctx.encode([stored.row for stored in store.of_task(entry.task)])
            rows = [MemoryRow.of(row, ctx.module_for_forward) for row in encoded]
            memories[entry.task] = [row for row in rows if row.tokens > 0]
            dropped = len(rows) - len(memories[entry.task])
            if dropped:
                ctx.notice(f"{dropped} of {len(rows)} memory rows of task '{entry.task}' have no label token")
            if not memories[entry.task]:
                raise UserError(
                    f"{ctx.earlier[-1].state_dir / self.name}.json: no memory row of task '{entry.task}' can be used "
                    "with this stage's template"
                )
        if self.config.mode == "agem" and memories:
            memories = {_POOLED: [row for rows in memories.values() for row in rows]}
        self._memories = memories
        from swift_cl.methods._spread import Layout

        shapes = {name: full_shape(parameter) for name, parameter in ctx.parameters.items()}
        # Of a model that is tuned in full a rank keeps parts: there are as many gradients as earlier tasks.
        self._layout = Layout(ctx, shapes, spread=not is_peft(ctx.model))

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        """Project the gradient where it would raise a memory's loss; leave it untouched elsewhere."""
        self._before = None
        if not self._memories:
            return
        assert self._layout is not None
        current = self._layout.own(grads[name] for name in grads.names)
        self._refresh(ctx)
        products = self._layout.products([*self._gradients, current]).cpu()
        if not products.isfinite().all():
            ctx.notice(f"step {ctx.step}: a gradient is not finite, so it is not projected")
            return
        against, norms = products[:-1, -1], products.diagonal().sqrt()
        cosines = against / (norms[:-1] * norms[-1]).clamp(min=torch.finfo(torch.float64).tiny)
        ctx.log("gem_violated", float((against < 0).sum()))
        ctx.log("gem_min_cos", float(cosines.min()))
        if (against < 0).any():
            projected = current.clone()
            for weight, gradient in zip(self._weights(ctx, products), self._gradients, strict=True):
                if weight != 0.0:
                    projected.add_(gradient, alpha=weight)
            for name, gradient in self._layout.whole(projected):
                grads[name] = gradient
        if ctx.is_logging_step:
            self._before = self._flat_weights(ctx)

    def after_step(self, ctx: TaskContext) -> None:
        """On logging steps: whether the optimizer's real update, which is not z, still keeps the memories' losses."""
        if self._before is None:
            return
        assert self._layout is not None
        descent = self._before - self._flat_weights(ctx)
        self._before = None
        products = self._layout.products([*self._gradients, descent])
        norms = products.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        ctx.log("gem_update_min_cos", (products[:-1, -1] / norms[:-1] / norms[-1]).min())

    def checkpoint_state(self, ctx: TaskContext) -> MethodState | None:
        """Memory gradients that later steps still use; batches are functions of the step and need no state."""
        if self.config.refresh_steps == 1 or not self._memories:
            return None
        assert self._layout is not None
        tensors = {
            f"gradient_{k}/{name}": tensor.cpu()
            for k, gradient in enumerate(self._gradients)
            for name, tensor in self._layout.whole(gradient)
        }
        return MethodState(tensors=tensors, meta={"computed_at": self._computed_at, "memories": list(self._memories)})

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        """Take the memory gradients back."""
        if state.meta["memories"] != list(self._memories):
            raise UserError(
                f"the checkpoint's memory gradients are of {state.meta['memories']}, this run's memories are of "
                f"{list(self._memories)}; was --gem_mode changed?"
            )
        self._computed_at = state.meta["computed_at"]
        assert self._layout is not None
        stored = [unpack(state.tensors, f"gradient_{k}") for k in range(len(self._memories))]
        self._gradients = [self._layout.own(t[name].to(ctx.device) for name in ctx.parameters) for t in stored]

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        """Add rows of this task to the memory."""
        rows = ctx.training_rows()
        store = RowStore.load(ctx, self.name)
        order = permutation(len(rows), self.config.seed, ctx.task, "store")
        module = ctx.module_for_forward
        chosen, dropped = usable_rows(
            ctx, rows, order, self.config.memory_size, usable=lambda encoded: MemoryRow.of(encoded, module).tokens > 0
        )
        if not chosen:
            raise UserError(f"task '{ctx.task}': no row has a label token, so there is none to remember")
        shares = store.shares(self.config.memory_size, False, len(chosen))
        store.add(SeenTask(ctx.task, len(rows), dropped), [StoredRow.of(rows[i], ctx.task) for i in chosen], shares)
        store.settings = {
            "strategy": "random",
            "budget": "per_task",
            "buffer_size": self.config.memory_size,
            "seed": self.config.seed,
        }
        return store.state()

    def _weights(self, ctx: TaskContext, products: "Tensor") -> list[float]:
        """How much of each memory gradient is added, from the products of all gradients (the current one last)."""
        matrix, against = products[:-1, :-1].numpy(), products[:-1, -1].numpy()
        if self.config.mode == "agem":
            return [agem_weight(float(matrix[0, 0]), float(against[0]))]
        solution = gem_weights(matrix, against, self.config.margin, self.config.eps)
        if solution.fell_back:
            ctx.notice(f"step {ctx.step}: weights above {LARGEST_WEIGHT:g}, so the ridge {FALLBACK_RIDGE:g} was used")
        return [float(weight) for weight in solution.weights]

    def _flat_weights(self, ctx: TaskContext) -> "Tensor":
        assert self._layout is not None
        weights = ctx.weights()
        return self._layout.own(weights[name] for name in ctx.parameters)

    def _refresh(self, ctx: TaskContext) -> None:
        since = ctx.step - ctx.step % self.config.refresh_steps
        if since == self._computed_at:
            return
        self._gradients = []  # frees the old ones first: there may be (t - 1) x parameters of them
        assert self._layout is not None
        for task, rows in self._memories.items():
            batch = memory_batch(rows, self.config.mem_batch, ctx.world_size, self.config.seed, ctx.step, task)
            self._gradients.append(memory_gradient(ctx, batch, self._layout))
        self._computed_at = since


def memory_batch(rows: list[MemoryRow], size: int, world_size: int, seed: int, step: int, task: str) -> list[MemoryRow]:
    """The memory rows of a step, over all ranks."""
    if size == 0:
        return rows
    return [rows[i] for i in permutation(len(rows), seed, step, task)[: max(size, world_size)]]


def memory_gradient(ctx: TaskContext, batch: Sequence[MemoryRow], layout: "Layout") -> "Tensor":
    """Gradient of the token-mean cross-entropy over `batch`, each rank computing its part; as the layout has it."""
    mine = batch[ctx.rank :: ctx.world_size]
    longest = math.ceil(len(batch) / ctx.world_size)
    shapes = {name: full_shape(parameter) for name, parameter in ctx.parameters.items()}
    totals = [torch.zeros(shape, dtype=torch.float32, device=ctx.device) for shape in shapes.values()]
    with ctx.statistics_mode():
        # Every rank runs the same number of forwards, because under ZeRO-3 a forward needs all of them; one that has
        # no rows left runs the first with its labels masked, which adds zero.
        for start in range(0, longest, ctx.micro_batch):
            rows = mine[start : start + ctx.micro_batch]
            inputs = dict(ctx.collate([row.encoded for row in rows or batch[:1]]))
            module, labels = ctx.module_for_forward, inputs["labels"]
            logits = module(**unlabelled(module, inputs)).logits.float()
            following = predicted(module, labels if rows else torch.full_like(labels, IGNORED))
            summed = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            for total, found in zip(totals, ctx.gradients_of(summed, list(shapes)), strict=True):
                if found is not None:
                    total += found
    return layout.summed(totals) / sum(row.tokens for row in batch)
