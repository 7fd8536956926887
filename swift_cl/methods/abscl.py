"""abscl: one adapter that all domains share and one for each; the domain of a question is found by its position."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.io import MethodState, read_json, sha256_file
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapter_history import joined, one_rank, widened
from swift_cl.methods._adapters import (
    ADAPTER_FILE,
    CONFIG_FILE,
    SERVED,
    TRAINED,
    activate,
    check_plain_lora,
    is_lora_a,
    load_frozen_adapter,
    redraw,
    rewritten_candidates,
    stored_adapter,
    write_adapter,
)
from swift_cl.methods._draws import permutation
from swift_cl.methods._gaussians import mean_and_scatter, shrunk_covariance, squared_distances
from swift_cl.methods._orthogonality import FORMS, overlap
from swift_cl.methods._prompts import routed_features, task_features
from swift_cl.methods._routing import Candidate, Route, RouteContext, RouteRequest, smallest
from swift_cl.methods._row_store import StoredRow, exact, round_half_up
from swift_cl.methods._state import check_shapes, shapes_of
from swift_cl.methods.base import (
    Gradients,
    Method,
    MethodConfig,
    Phase,
    Support,
    TaskContext,
    TrainingRow,
    setting,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

SHARED, DOMAIN, WARMUP = "shared", "domain", "warmup"
REPLAY, FIXED = "replay", "cl_fixed"


@dataclass
class AbsclConfig(MethodConfig):
    """Flags of `abscl`."""

    orth_lambda: float = setting(0.1, "Strength of the domain adapter's orthogonality to the shared one, >= 0.")
    orth: str = setting(
        "squared",
        "What is small when they are orthogonal: the 'squared' entries of A_n A_s', or their absolute values, 'l1'.",
        FORMS,
    )
    domain_on: str = setting(
        "base",
        "What the domain adapter is trained on: the 'base' model alone, or the base model with the 'shared' adapter, "
        "the sum that is served.",
        ("base", "shared"),
    )
    replay_ratio: float = setting(
        0.1, "Share of each domain's rows, at least one row, that is kept and trains the shared adapter; in (0, 1]."
    )
    warmup_epochs: float = setting(
        1.0,
        "Epochs of the shared adapter over the kept rows beside their frozen domain adapters, >= 0; 0 leaves it out. "
        "--max_steps, where given, bounds each of a stage's trainings instead.",
    )
    route: str = setting(
        "mahalanobis",
        "How a question's domain is found: by 'mahalanobis' or 'euclidean' distance to the domains' means, or "
        "'oracle', by its task, which must then be known.",
        ("mahalanobis", "euclidean", "oracle"),
    )
    shrinkage: float = setting(0.1, "Share rho of the identity in the covariance, in (0, 1].")
    stats_rows: int = setting(0, "Rows of a domain that its mean and covariance are taken from, >= 2; 0 for all.")
    route_batch: int = setting(32, "Questions in one forward of the router, >= 1.")

    def validate(self) -> None:
        for name in ("orth_lambda", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                self.fail("abscl", name, "a number >= 0")
        for name in ("replay_ratio", "shrinkage"):
            if not 0 < getattr(self, name) <= 1:
                self.fail("abscl", name, "a number in (0, 1]")
        if self.stats_rows != 0 and self.stats_rows < 2:
            self.fail("abscl", "stats_rows", "0, or a whole number >= 2")
        if self.route_batch < 1:
            self.fail("abscl", "route_batch", "a whole number >= 1")


class Abscl(Method):
    """h = W x + s (B_s A_s + B_n A_n) x for a question of domain n; n is the one whose mean is nearest.

    A stage is three trainings: the shared adapter on the kept rows; a new domain adapter on D_n with a penalty on
    A_n A_s'; and the shared one again, each kept row beside the frozen adapter of its own domain.
    """

    name: ClassVar[str] = "abscl"
    title: ClassVar[str] = "LLM-CL: a shared and a domain adapter, kept orthogonal, chosen by Mahalanobis distance"
    summary: ClassVar[str] = (
        "a shared adapter and one a task, kept orthogonal and summed; the distance to the tasks' questions chooses"
    )
    cost: ClassVar[str] = "three trainings, 2 of them on kept rows"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.05496"
    config_class: ClassVar[type[MethodConfig]] = AbsclConfig
    support: ClassVar[Support] = Support(tuners=("lora",), full_deepspeed=(), packing=False, sequence_parallel=False)
    needs_rows: ClassVar[bool] = True
    starts_fresh: ClassVar[bool] = True

    config: AbsclConfig

    def __init__(self, config: AbsclConfig) -> None:
        super().__init__(config)
        self._spans: dict[str, Tensor] = {}  # A_s' by name of A, [in, rank]; in the domain's training alone
        self._domains: dict[str, str] = {}  # adapter name by task; in the warm-up alone

    @property
    def _last(self) -> str:
        return WARMUP if self.config.warmup_epochs > 0 else DOMAIN

    def phases(self, first_task: bool) -> Sequence[Phase]:
        before = (Phase(SHARED), Phase(DOMAIN))
        if self._last == DOMAIN:
            return before
        return (*before, Phase(WARMUP, {"num_train_epochs": str(self.config.warmup_epochs)}))

    # --- rows --------------------------------------------------------------------------------------------------------

    def _kept(self, ctx: TaskContext, rows: Sequence[TrainingRow]) -> list[StoredRow]:
        """The rows of every domain so far, this one included, that train the shared adapter."""
        old = ctx.previous_state().rows[REPLAY] if ctx.earlier else []
        wanted = max(1, round_half_up(exact(self.config.replay_ratio) * len(rows)))
        own: list[StoredRow] = []
        for i in permutation(len(rows), self.name, ctx.seed, ctx.task):
            if len(own) < wanted and ctx.encode([rows[i]])[0]:
                own.append(StoredRow.of(rows[i], ctx.task))
        if not own:
            raise UserError(f"task '{ctx.task}': no row fits the training template, so there is none to keep")
        return [*map(StoredRow.from_json, old), *own]

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        if len(rows) < 2:
            raise UserError(f"task '{ctx.task}' has {len(rows)} row, but method 'abscl' needs 2: one has no covariance")
        if ctx.phase == DOMAIN:
            return rows
        kept = self._kept(ctx, rows)
        if ctx.phase == SHARED:
            return [kept[i].row for i in in_blocks([SHARED] * len(kept), ctx.global_batch)]
        blocks = in_blocks([stored.task for stored in kept], ctx.global_batch)
        return [{**kept[i].row, "channel": kept[i].task} for i in blocks]

    def batch_order(self, ctx: TaskContext, n_rows: int, epoch: int) -> Sequence[int] | None:
        """In the warm-up, whole optimizer steps of one domain in random order; rows mixed within a step."""
        if ctx.phase != WARMUP:
            return None
        batch = ctx.global_batch
        if n_rows % batch != 0:
            raise UserError(
                f"the warm-up of method 'abscl' laid out whole batches of {batch} rows, but {n_rows} are left: the "
                "template dropped rows that an earlier stage kept; raise --max_length to what it was there"
            )
        blocks = permutation(n_rows // batch, self.name, ctx.seed, ctx.task, "blocks", epoch)
        return [n * batch + i for n in blocks for i in permutation(batch, self.name, ctx.seed, ctx.task, n, epoch)]

    # --- training ----------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        check_plain_lora(self.name, ctx.parameters)
        one_rank(self.name, model)
        if ctx.phase == DOMAIN:
            redraw(model, self.name, ctx.seed, ctx.task)
            if self.config.domain_on == SHARED:
                load_frozen_adapter(model, ctx.phases[SHARED], FIXED)
                activate(model, TRAINED, FIXED)
            return model
        start = ctx.phases.get(SHARED)
        if start is None and ctx.earlier:
            start = self._checked(ctx, ctx.earlier[-1].state_dir / SHARED)
        if start is not None:
            stored = stored_adapter(start)
            check_shapes(self.name, shapes_of(stored), shapes_of(ctx.parameters))
            with torch.no_grad():
                for name, tensor in stored.items():
                    ctx.parameters[name].copy_(tensor)
        if ctx.phase == WARMUP:
            for number, (task, folder) in enumerate(self._domain_dirs(ctx).items()):
                self._domains[task] = f"{FIXED}_{number}"
                load_frozen_adapter(model, folder, self._domains[task])
        return model

    def _checked(self, ctx: TaskContext, folder: Path) -> Path:
        """A folder of the previous stage's state whose adapter is the one that the state records."""
        file = folder / ADAPTER_FILE
        if not file.is_file() or sha256_file(file) != ctx.previous_state().meta["sha256"][folder.name]:
            raise UserError(f"{file}: missing, or differs from the hash in {folder.parent / self.name}.json")
        return folder

    def _domain_dirs(self, ctx: TaskContext) -> dict[str, Path]:
        """The domain adapters of all tasks, in order; the current one's as its training left it."""
        found = {stage.task: stage.state_dir / DOMAIN for stage in ctx.earlier}
        return {**found, ctx.task: ctx.phases[DOMAIN]} if DOMAIN in ctx.phases else found

    def train_begin(self, ctx: TaskContext) -> None:
        if ctx.phase == DOMAIN and self.config.orth_lambda > 0:
            shared = stored_adapter(ctx.phases[SHARED])
            self._spans = {name: a.float().T.to(ctx.device) for name, a in shared.items() if is_lora_a(name)}

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        """Put the frozen adapter of the coming step's domain beside the shared one."""
        if ctx.phase != WARMUP:
            return
        tasks = {task for batch in batches for task in batch["channel"]}
        if len(tasks) != 1:
            raise UserError(f"a step of the warm-up has rows of {', '.join(sorted(tasks))}, expected one domain's")
        activate(ctx.model, TRAINED, self._domains[tasks.pop()])

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        if not self._spans:
            return
        weights = ctx.live_weights()
        total, slopes = torch.zeros((), device=ctx.device), {}
        for name, span in self._spans.items():
            value, slope = overlap(weights[name], span, self.config.orth)
            slopes[name] = self.config.orth_lambda * slope
            total = total + value
        for name, part in ctx.parts_of(slopes).items():
            grads.add_part(name, part)
        if ctx.is_logging_step:
            ctx.log("abscl_overlap", total)

    # --- what is kept ------------------------------------------------------------------------------------------------

    def _pair(self, ctx: TaskContext, trained: "Mapping[str, Tensor]") -> "tuple[Mapping[str, Tensor], ...]":
        """(shared, domain) of the current task, one of which was trained last."""
        if ctx.phase == WARMUP:
            return trained, stored_adapter(ctx.phases[DOMAIN])
        return stored_adapter(ctx.phases[SHARED]), trained

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """What is served for the current domain: shared and domain adapter as one."""
        if ctx.phase != self._last:
            return tensors
        shared, domain = self._pair(ctx, {name: tensor.detach().cpu() for name, tensor in tensors.items()})
        same = {"r": 1, "lora_alpha": 1}  # both were trained with this stage's flags
        return joined(shared, same, domain, same)[0]

    def export_config(self, ctx: TaskContext, config: dict[str, Any]) -> dict[str, Any]:
        return widened(config, 2 * config["r"]) if ctx.phase == self._last else config

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        if ctx.phase != self._last:
            return None
        mean, scatter, rows = self._statistics(ctx)
        weights = {name: weight.detach().cpu() for name, weight in ctx.weights().items()}
        if ctx.rank != 0:
            return None
        folder = ctx.this_stage.state_dir
        config = read_json(ctx.phases[SHARED] / CONFIG_FILE)
        shared, domain = self._pair(ctx, weights)
        for name, tensors in ((SHARED, shared), (DOMAIN, domain)):
            write_adapter(folder / name, tensors, config)
        for stage in ctx.earlier:
            own = stage.state_dir / DOMAIN
            served = joined(shared, config, stored_adapter(own), read_json(own / CONFIG_FILE))
            write_adapter(folder / SERVED / stage.task, *served)
        means, n_rows = mean.float()[None], [rows]
        if ctx.earlier:
            before = ctx.previous_state()
            means = torch.cat([before.tensors["means"], means])
            scatter, n_rows = before.tensors["scatter"] + scatter, [*before.meta["n_rows"], rows]
        meta = {
            "n_rows": n_rows,
            "sha256": {name: sha256_file(folder / name / ADAPTER_FILE) for name in (SHARED, DOMAIN)},
        }
        kept = self._kept(ctx, ctx.training_rows())
        return MethodState({"means": means, "scatter": scatter}, meta, {REPLAY: [row.to_json() for row in kept]})

    def _statistics(self, ctx: TaskContext) -> "tuple[Tensor, Tensor, int]":
        """Mean and scatter of what the base model makes of this domain's questions, and the number of rows."""
        rows = ctx.training_rows()
        wanted = self.config.stats_rows or len(rows)
        drawn = sorted(permutation(len(rows), self.name, ctx.seed, ctx.task, "stats")[:wanted])
        mean, scatter = mean_and_scatter(task_features(ctx, [rows[i] for i in drawn]))
        return mean, scatter, len(drawn)

    # --- inference ---------------------------------------------------------------------------------------------------

    def needs_task_id(self) -> bool:
        return self.config.route == "oracle"

    def candidates(self, ctx: TaskContext) -> list[Candidate]:
        return rewritten_candidates(ctx)

    def route(self, ctx: RouteContext, requests: Sequence[RouteRequest]) -> list[Route]:
        state = ctx.state()
        covariance = None
        if self.config.route == "mahalanobis":
            covariance = shrunk_covariance(state.tensors["scatter"], sum(state.meta["n_rows"]), self.config.shrinkage)
        features = routed_features(ctx, self.name, None, requests, self.config.route_batch)
        distances = squared_distances(features, state.tensors["means"], covariance)
        scores = [dict(zip(state.meta["tasks"], row, strict=True)) for row in distances.tolist()]
        return [Route(smallest(each), each) for each in scores]


def in_blocks(tasks: Sequence[str], batch: int) -> list[int]:
    """Positions of rows such that every `batch` consecutive ones are of one task. Where a task's last block is not
    full (a few rows on many processes may not even fill one), its rows come again from the first on.

    Args:
        tasks: the task of each row.
    """
    found: list[int] = []
    for task in dict.fromkeys(tasks):
        own = [i for i, other in enumerate(tasks) if other == task]
        found += [own[i % len(own)] for i in range(math.ceil(len(own) / batch) * batch)]
    return found
