"""cl_moe: experts chosen by the token and by the task, and blended with what they were before each task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.io import MethodState, read_json
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import (
    CONFIG_FILE,
    SERVED,
    TRAINED,
    rewritten_candidates,
    stored_adapter,
    write_adapter,
)
from swift_cl.methods._draws import permutation, seed32
from swift_cl.methods._embeddings import _last_hidden
from swift_cl.methods._prompts import ROWS_AT_ONCE, over_rows, routed_features, task_features
from swift_cl.methods._routing import Candidate, Route, RouteContext, RouteRequest, smallest
from swift_cl.methods._state import check_shapes, pack, shapes_of, unpack
from swift_cl.methods.base import Method, MethodConfig, Support, TaskContext, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

A, B, ROUTER, GATE = ".moelora_A.", ".moelora_B.", ".moelora_router.", ".moelora_task."


@dataclass
class ClMoeConfig(MethodConfig):
    """Flags of `cl_moe`; experts, scaling and start of the routers are the tuner's `--moe_lora_*`."""

    beta: float = setting(0.5, "Share of the token's gate; that of the task's gate is 1 - beta. In [0, 1].")
    gamma: float = setting(
        0.7,
        "What an expert keeps of its weights before the task, 1 - gamma where only the new task uses it; in [0.5, 1].",
    )
    top_k: int = setting(2, "Experts that count as a task's own, >= 1 and at most --moe_lora_num_experts.")
    scope: str = setting(
        "layer", "Whether every 'layer' has its own set of them, or all layers one: 'global'.", ("layer", "global")
    )
    history: str = setting(
        "last",
        "Earlier tasks whose experts are not only the new task's: the 'last', or all ('union').",
        ("last", "union"),
    )
    count_rows: int = setting(512, "Rows of the task on which experts are counted and centres found, >= 1.")
    centers: int = setting(1, "Centres that stand for a task where its questions are recognised, >= 1.")
    route: str = setting(
        "centre",
        "How a question's task is found: by the nearest 'centre', or 'oracle', by its task, which must then be known.",
        ("centre", "oracle"),
    )
    route_batch: int = setting(32, "Questions in one forward of the router, >= 1.")

    def validate(self) -> None:
        if not 0 <= self.beta <= 1:
            self.fail("cl_moe", "beta", "a number in [0, 1]")
        if not 0.5 <= self.gamma <= 1:
            self.fail("cl_moe", "gamma", "a number in [0.5, 1]")
        for name in ("top_k", "count_rows", "centers", "route_batch"):
            if getattr(self, name) < 1:
                self.fail("cl_moe", name, "a whole number >= 1")


class ClMoe(Method):
    """g = beta softmax(R x) + (1 - beta) softmax(s_t); after task t, theta_t = lam o theta_{t-1} + (1 - lam) o phi_t.

    phi_t are the trained weights, and lam, one number an expert, is 1 - gamma where only task t uses it, else gamma.
    s_t are E numbers a layer; those of earlier tasks are no weights of the model but travel in the state.
    """

    name: ClassVar[str] = "cl_moe"
    title: ClassVar[str] = "CL-MoE: dual-router experts with momentum"
    summary: ClassVar[str] = (
        "experts with a router for tokens and one for tasks, blended with their past after each task"
    )
    cost: ClassVar[str] = "the experts"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.00413"
    config_class: ClassVar[type[MethodConfig]] = ClMoeConfig
    support: ClassVar[Support] = Support(tuners=("moelora",), full_deepspeed=(), sequence_parallel=False)
    needs_rows: ClassVar[bool] = True

    config: ClMoeConfig

    def __init__(self, config: ClMoeConfig) -> None:
        super().__init__(config)
        self._layers: list[str] = []
        self._experts = 1
        self._counts: Tensor | None = None  # [layers, experts]
        self._sets: dict[str, list[int]] = {}

    def required_flags(self) -> Mapping[str, str]:
        return {"tuner_type": "moelora"}

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        self._experts = model.peft_config[TRAINED].num_experts
        if self.config.top_k > self._experts:
            self.config.fail(self.name, "top_k", f"at most the number of experts ({self._experts})")
        if self.config.top_k == self._experts:
            ctx.notice("every expert counts as every task's own: all of them are blended alike")
        model.base_model.new_task(TRAINED, self.config.beta)
        self._layers = sorted(name.split(A)[0] for name in ctx.parameters if A in name)
        return model

    # --- when the task is learned ------------------------------------------------------------------------------------

    def train_end(self, ctx: TaskContext) -> None:
        """Count on the trained weights how often an expert is among a token's `top_k`, over the tokens that the rows
        have, padding left out."""
        encoded = [row for row in ctx.encode(self._drawn(ctx)) if row]
        counters = [_TopExperts(_router(ctx.model, layer), self.config.top_k) for layer in self._layers]
        try:

            def compute(batch: list[int]) -> "Tensor":
                inputs = dict(ctx.collate([encoded[i] for i in batch]))
                if len(inputs.pop("labels")) != len(batch):  # a padding-free collator joins rows: one at a time
                    return torch.cat([compute([i]) for i in batch])
                _last_hidden(ctx.module_for_forward, inputs)
                attended = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
                return torch.cat([counter.of_rows(attended) for counter in counters], dim=1)

            rows = over_rows(ctx, len(encoded), ROWS_AT_ONCE, compute).double()
        finally:
            for counter in counters:
                counter.remove()
        self._counts = rows.sum(dim=0).view(len(self._layers), self._experts).cpu()
        self._sets = task_experts(self._layers, self._counts, self.config.top_k, self.config.scope)

    def _drawn(self, ctx: TaskContext) -> list[dict[str, Any]]:
        rows = ctx.training_rows()
        return [
            rows[i] for i in sorted(permutation(len(rows), self.name, ctx.seed, ctx.task)[: self.config.count_rows])
        ]

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        if not ctx.earlier:
            return tensors
        before = stored_adapter(ctx.earlier[-1].weights_dir)
        check_shapes(self.name, shapes_of(before), shapes_of(tensors))
        known = ctx.previous_state().meta["sets"]
        earlier = known[-1:] if self.config.history == "last" else known
        kept = dict(tensors)
        for layer in self._layers:
            old = {expert for sets in earlier for expert in sets[layer]}
            shares = kept_shares(self._experts, old, set(self._sets[layer]), self.config.gamma)
            for part, column in ((A, True), (B, False)):
                name = f"{layer}{part}weight"
                new = tensors[name].detach().to("cpu", torch.float32)
                lam = shares.repeat_interleave(new.shape[0 if column else 1] // self._experts)
                lam = lam[:, None] if column else lam[None]
                kept[name] = (lam * before[name].float() + (1 - lam) * new).to(tensors[name].dtype)
        return kept

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        features = task_features(ctx, self._drawn(ctx))
        weights = {name: weight.detach().cpu() for name, weight in ctx.weights().items() if GATE in name}
        if ctx.rank != 0:
            return None
        assert self._counts is not None
        before = ctx.previous_state() if ctx.earlier else MethodState()
        tasks = [stage.task for stage in ctx.earlier]
        tensors = {
            **{name: tensor for name, tensor in before.tensors.items() if name.startswith(("gate/", "centres/"))},
            **pack(**{f"gate/{ctx.task}": weights}),
            f"centres/{ctx.task}": centres(features, self.config.centers, seed32(self.name, ctx.seed, ctx.task)),
            "counts": self._counts.float(),
        }
        own = ctx.this_stage.weights_dir
        kept, config = stored_adapter(own), read_json(own / CONFIG_FILE)
        for task in tasks:
            gates = {name: gate.to(kept[name].dtype) for name, gate in unpack(tensors, f"gate/{task}").items()}
            write_adapter(ctx.this_stage.state_dir / SERVED / task, {**kept, **gates}, config)
        return MethodState(tensors, {"sets": [*before.meta.get("sets", []), self._sets]})

    # --- inference ---------------------------------------------------------------------------------------------------

    def needs_task_id(self) -> bool:
        return self.config.route == "oracle"

    def candidates(self, ctx: TaskContext) -> list[Candidate]:
        """The kept adapter with the gate of each task."""
        return rewritten_candidates(ctx)

    def route(self, ctx: RouteContext, requests: Sequence[RouteRequest]) -> list[Route]:
        known = unpack(ctx.state().tensors, "centres")
        features = routed_features(ctx, self.name, None, requests, self.config.route_batch)
        distances = {task: nearest(features, known[task]).tolist() for task in ctx.tasks}
        scores = [{task: values[i] for task, values in distances.items()} for i in range(len(requests))]
        return [Route(smallest(each), each) for each in scores]


class _TopExperts:
    """Counts at a layer's router, for the rows of the last forward, the experts among each token's k largest."""

    def __init__(self, router: Any, top_k: int) -> None:
        self._top_k = top_k
        self._logits: Tensor | None = None
        self._handle = router.register_forward_hook(self._keep)

    def _keep(self, module: Any, arguments: Any, logits: "Tensor") -> None:
        self._logits = logits.detach()

    def of_rows(self, attended: "Tensor") -> "Tensor":
        """[rows, experts].

        Args:
            attended: 1 for a token, 0 for padding, [rows, length].
        """
        assert self._logits is not None
        experts = self._logits.shape[-1]
        logits = self._logits.view(*attended.shape, experts)
        chosen = torch.zeros_like(logits).scatter(-1, logits.topk(self._top_k, dim=-1).indices, 1.0)
        return (chosen * attended.to(chosen.dtype)[..., None]).float().sum(dim=1)

    def remove(self) -> None:
        """Leave the model as it was."""
        self._handle.remove()


def _router(model: Any, layer: str) -> Any:
    return model.get_submodule(f"base_model.model.{layer}").moelora_router[TRAINED]


def task_experts(layers: Sequence[str], counts: "Tensor", top_k: int, scope: str) -> dict[str, list[int]]:
    """The experts of the largest counts for each layer, ascending; of equal ones the first.

    Args:
        counts: [layers, experts].
        scope: 'layer', or 'global' for one set of the sums over all layers.
    """
    if scope == "global":
        counts = counts.sum(dim=0).expand_as(counts)
    found = {}
    for layer, row in zip(layers, counts.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))
        found[layer] = sorted(order[:top_k])
    return found


def kept_shares(experts: int, old: set[int], new: set[int], gamma: float) -> "Tensor":
    """lam of each expert, [experts]: 1 - gamma for those of the new task that no earlier one used, else gamma."""
    return torch.tensor([1 - gamma if i in new and i not in old else gamma for i in range(experts)])


def centres(features: "Tensor", count: int, seed: int) -> "Tensor":
    """The means of at most `count` clusters (k-means), [clusters, width].

    Args:
        features: [rows, width].
    """
    from swift_cl.methods._selection import kmeans_clusters

    clusters = kmeans_clusters(features.double().numpy(), count, seed)
    return torch.stack([features[[row for row, _ in cluster]].mean(dim=0) for cluster in clusters])


def nearest(features: "Tensor", known: "Tensor") -> "Tensor":
    """Distance of each question to the nearest of a task's centres, [questions].

    Args:
        features: [questions, width].
        known: [centres, width].
    """
    distances: Tensor = torch.linalg.vector_norm(features[:, None] - known[None], dim=-1).min(dim=1).values
    return distances
