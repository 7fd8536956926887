"""adapter_cl: one adapter a task, and at inference the one to which the question is least surprising."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import RunFailure
from swift_cl.io import MethodState, sha256_json
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import start_from
from swift_cl.methods._draws import permutation
from swift_cl.methods._prompts import ROWS_AT_ONCE, first_question, mean_nll, over_rows, span_of_question, without_text
from swift_cl.methods._routing import Candidate, Route, RouteContext, RouteRequest, smallest
from swift_cl.methods.base import Method, MethodConfig, Support, TaskContext, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

CALIBRATION_ROWS = 512
_LARGEST_EXPONENT = 700.0


@dataclass
class AdapterClConfig(MethodConfig):
    """Flags of `adapter_cl`."""

    prompt_loss_weight: float = setting(
        1.0, "Weight of a prompt token in the training loss, that of an answer token being 1; in [0, 10]."
    )
    router: str = setting(
        "ppl",
        "How an adapter is chosen: 'ppl' by the smallest perplexity of the question, 'calibrated' by the smallest "
        "standardised negative log-likelihood (mean and deviation of each adapter's own training rows), 'oracle' by "
        "the question's task, which must then be known.",
        ("ppl", "calibrated", "oracle"),
    )
    score: str = setting(
        "content",
        "Which tokens the router scores: 'content', the question without what the template writes around it, or "
        "'prompt', all but the first.",
        ("content", "prompt"),
    )
    init: str = setting(
        "fresh", "What a new task's adapter starts from: 'fresh', or the 'previous' task's.", ("fresh", "previous")
    )
    route_batch: int = setting(32, "Questions in one forward of the router, >= 1.")

    def validate(self) -> None:
        if not 0 <= self.prompt_loss_weight <= 10:
            self.fail("adapter_cl", "prompt_loss_weight", "a number in [0, 10]")
        if self.prompt_loss_weight == 0 and self.router != "oracle":
            self.fail(
                "adapter_cl",
                "prompt_loss_weight",
                f"a number in (0, 10] with --adapter_cl_router {self.router}, which scores the prompt and would learn "
                "nothing about it",
            )
        if self.route_batch < 1:
            self.fail("adapter_cl", "route_batch", "a whole number >= 1")


class AdapterCl(Method):
    """A LoRA a task, trained on all tokens; at inference i* = argmin_i of the question's perplexity under adapter i."""

    name: ClassVar[str] = "adapter_cl"
    title: ClassVar[str] = "AdapterCL: one adapter per task, chosen by perplexity"
    summary: ClassVar[str] = "an adapter a task; the perplexity of the question chooses one at inference"
    cost: ClassVar[str] = "none"
    paper: ClassVar[str] = "https://arxiv.org/abs/2012.15504"
    config_class: ClassVar[type[MethodConfig]] = AdapterClConfig
    support: ClassVar[Support] = Support(tuners=("lora",), full_deepspeed=())
    needs_rows: ClassVar[bool] = True
    starts_fresh: ClassVar[bool] = True

    config: AdapterClConfig

    def __init__(self, config: AdapterClConfig) -> None:
        super().__init__(config)
        self._gain: Tensor | None = None

    @property
    def _weighted(self) -> bool:
        """Whether prompt tokens have a weight that ms-swift's own scales do not know."""
        return self.config.prompt_loss_weight not in (0, 1)

    def supports(self) -> Support:
        return Support(
            tuners=("lora",), full_deepspeed=(), liger=not self._weighted, sequence_parallel=not self._weighted
        )

    # --- training ----------------------------------------------------------------------------------------------------

    def required_flags(self) -> Mapping[str, str]:
        if self.config.prompt_loss_weight == 0:
            return {}
        weight = f"+prompt_weight_{self.config.prompt_loss_weight!r}" if self._weighted else ""
        return {"loss_scale": f"all{weight}"}

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        if self.config.init == "previous" and ctx.earlier:
            start_from(self.name, ctx, ctx.earlier[-1].weights_dir)
        return model

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        """ms-swift divides the weighted sum by the number of tokens; it is to be divided by the sum of weights."""
        if not self._weighted:
            return
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            trained = batch["labels"][:, 1:] != -100
            sums += torch.stack((trained.sum(), (batch["loss_scale"][:, 1:] * trained).sum())).double().cpu()
        tokens, weights = ctx.all_reduce_sum(sums.to(ctx.device))
        self._gain = tokens / weights

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        if self._gain is None:
            return None
        return loss * (self._gain.to(loss.dtype) - 1)

    # --- what the router needs ---------------------------------------------------------------------------------------

    def end_task(self, ctx: TaskContext) -> MethodState:
        rows = ctx.training_rows()
        drawn = permutation(len(rows), self.name, ctx.seed, ctx.task)[:CALIBRATION_ROWS]
        asked = [first_question(rows[i]) for i in drawn]
        prompts = ctx.encode_prompts(asked)
        spans = self._spans(prompts, ctx.encode_prompts([without_text(messages) for messages in asked]))

        def compute(batch: list[int]) -> "Tensor":
            model = ctx.module_for_forward
            return mean_nll(model, [prompts[i] for i in batch], [spans[i] for i in batch], ctx.device).unsqueeze(1)

        values = over_rows(ctx, len(prompts), ROWS_AT_ONCE, compute).double()
        own = {
            "n_rows": len(prompts),
            "nll_mean": float(values.mean()),
            "nll_std": float(values.std(unbiased=False)),
            "score": self.config.score,
        }
        known = dict(ctx.previous_state().meta["router"]) if ctx.earlier else {}
        return MethodState(meta={"router": {**known, ctx.task: own}})

    def _spans(self, prompts: Sequence[list[int]], empty: Sequence[list[int]]) -> list[tuple[int, int]]:
        if self.config.score == "prompt":
            return [(1, len(ids)) for ids in prompts]
        return [span_of_question(ids, around) for ids, around in zip(prompts, empty, strict=True)]

    # --- inference ---------------------------------------------------------------------------------------------------

    def needs_task_id(self) -> bool:
        return self.config.router == "oracle"

    def route(self, ctx: RouteContext, requests: Sequence[RouteRequest]) -> list[Route]:
        found = {candidate.name: self._nlls(ctx, candidate, requests) for candidate in ctx.candidates}
        if self.config.router == "calibrated":
            known = ctx.state().meta["router"]
            for name, values in found.items():
                # A task whose rows all score alike has no deviation to measure in.
                spread = known[name]["nll_std"] or 1.0
                found[name] = [(value - known[name]["nll_mean"]) / spread for value in values]
        else:
            found = {n: [math.exp(min(value, _LARGEST_EXPONENT)) for value in values] for n, values in found.items()}
        scores = [{name: values[i] for name, values in found.items()} for i in range(len(requests))]
        return [Route(smallest(each), each) for each in scores]

    def _nlls(self, ctx: RouteContext, candidate: Candidate, requests: Sequence[RouteRequest]) -> list[float]:
        """What each request costs under one adapter; one that was seen in another stage is not computed again."""
        adapter = ctx.adapter_sha256(candidate.dir)
        asked = [request.asked_of(candidate.name) for request in requests]
        keys = [sha256_json([self.name, self.config.score, adapter, [dict(m) for m in messages]]) for messages in asked]
        prompts = {key: ctx.encode(messages) for key, messages in zip(keys, asked, strict=True) if key not in ctx.cache}
        empty = {key: ctx.encode(without_text(m)) for key, m in zip(keys, asked, strict=True) if key in prompts}
        # Rows of like length side by side: less padding.
        order = sorted(prompts, key=lambda key: len(prompts[key]))
        with ctx.model_with(candidate.dir) as model:
            for start in range(0, len(order), self.config.route_batch):
                batch = order[start : start + self.config.route_batch]
                rows = [prompts[key] for key in batch]
                values = mean_nll(model, rows, self._spans(rows, [empty[key] for key in batch]), ctx.device)
                ctx.cache.update(zip(batch, values.tolist(), strict=True))
        found: list[float] = [ctx.cache[key] for key in keys]
        if not all(map(math.isfinite, found)):
            raise RunFailure(f"adapter {candidate.dir} gives a question no finite likelihood, so it cannot be routed")
        return found
