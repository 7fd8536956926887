"""cia: Large Continual Instruction Assistant, an average of the weights whose inertia is chosen at every step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import TRAINED, start_from
from swift_cl.methods._draws import seed32
from swift_cl.methods._instructions import (
    MUCH_CJK,
    Group,
    cjk_share,
    group_from,
    instruction,
    instructions,
    mean_similarity,
)
from swift_cl.methods._routing import Candidate, Route, RouteContext, RouteRequest, largest
from swift_cl.methods._state import check_shapes, pack, shapes_of, unpack
from swift_cl.methods.base import Gradients, Method, MethodConfig, Support, TaskContext, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

# Above this the average has followed the weights all the way, and protects nothing.
PLAIN = 0.98


@dataclass
class CiaConfig(MethodConfig):
    """Flags of `cia`."""

    variant: str = setting(
        "released",
        "How the inertia beta is chosen: 'released' as in the authors' code, 'paper' as in the paper's formula, or "
        "'fixed' (always cia_beta_fallback).",
        ("released", "paper", "fixed"),
    )
    beta_fallback: float = setting(0.99, "beta where the formula gives none in (0, 1), in (0, 1).")
    scale: float = setting(2.0, "Factor in the formula of variant 'released', > 0; only with that variant.")
    grouping: bool = setting(
        False,
        "Tasks with similar instructions share an adapter, others get one of their own; at inference every question "
        "goes to the adapter of the nearest instructions.",
    )
    sim_threshold: float = setting(0.9, "Similarity from which a task joins a group, in [0, 1]; with grouping.")
    instruction: str = setting(
        "auto",
        "What is a row's instruction: 'auto', its own system prompt where it has one that is not the whole task's, "
        "else as with 'first_user', the first 256 characters of the user's first text.",
        ("auto", "first_user"),
    )
    tokenizer: str = setting(
        "word",
        "What instructions are compared by: 'word', or 'char' (characters and pairs; taken in any case for texts with "
        "many Chinese, Japanese or Korean characters).",
        ("word", "char"),
    )
    codebook_max: int = setting(64, "Instructions kept a group, the most frequent, >= 1.")
    new_group_init: str = setting(
        "latest", "What a new group's adapter starts from: the 'latest' task's, or 'fresh'.", ("latest", "fresh")
    )
    no_match: str = setting(
        "best",
        "What answers a question whose nearest group is below the threshold: the 'best' one all the same, the 'last' "
        "group, or 'error' (the evaluation stops).",
        ("best", "last", "error"),
    )

    def validate(self) -> None:
        if not 0 < self.beta_fallback < 1:
            self.fail("cia", "beta_fallback", "a number in (0, 1)")
        if not 0 < self.scale < math.inf:
            self.fail("cia", "scale", "a number > 0")
        if self.variant != "released" and self.scale != CiaConfig.scale:
            self.fail("cia", "scale", "only with --cia_variant released")
        if not 0 <= self.sim_threshold <= 1:
            self.fail("cia", "sim_threshold", "a number in [0, 1]")
        if self.codebook_max < 1:
            self.fail("cia", "codebook_max", "a whole number >= 1")
        for name in ("sim_threshold", "instruction", "tokenizer", "codebook_max", "new_group_init", "no_match"):
            if not self.grouping and getattr(self, name) != getattr(CiaConfig, name):
                self.fail("cia", name, "only with --cia_grouping true")


@dataclass
class Running:
    """The average and what its formula needs, while a task is trained. Everything is fp32.

    Attributes:
        ema: theta* by name.
        start: the weights when the task began, on the CPU; only the report at the end reads them.
        before: the weights before the current step.
        last_gradient: all gradients of the last applied step as one vector; None before the first.
        sums: over the steps, of the mean beta and of the share of fallbacks.
        steps: their number.
    """

    ema: "dict[str, Tensor]"
    start: "dict[str, Tensor]"
    before: "dict[str, Tensor]"
    last_gradient: "Tensor | None"
    sums: "Tensor"
    steps: int = 0


class Cia(Method):
    """theta*_t = beta_t theta*_{t-1} + (1 - beta_t) theta_t after every step, one beta a tensor; theta* is kept.

    The live weights are never replaced. Off in the first task, which is plain fine-tuning.
    """

    name: ClassVar[str] = "cia"
    title: ClassVar[str] = "Large Continual Instruction Assistant (dynamic EMA)"
    summary: ClassVar[str] = "keeps a moving average of the weights with a step-wise balance weight"
    cost: ClassVar[str] = "about 1.0x"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10868"
    config_class: ClassVar[type[MethodConfig]] = CiaConfig
    support: ClassVar[Support] = Support(
        tuners=("lora",), full_deepspeed=(), zero0_low_precision=False, encoder_decoder=True
    )

    config: CiaConfig

    def __init__(self, config: CiaConfig) -> None:
        super().__init__(config)
        self._run: Running | None = None  # None in the first task of a group
        self._groups: list[Group] = []  # with this task in its own
        self._own: Group | None = None
        self._gradient: Tensor | None = None

    # --- groups ------------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        """With grouping: find the task's group, on every rank alike, and start from that group's adapter."""
        if not self.config.grouping:
            return model
        if ctx.earlier:
            self._groups = [group_from(value) for value in ctx.previous_state().meta.get("groups", ())]
            if not self._groups:
                raise UserError(
                    f"--cia_grouping is true, but the stage before ({ctx.earlier[-1].dir}) was trained without it"
                )
        texts = instructions(ctx.training_rows(), ctx.system, self.config.instruction)
        texts = dict(list(texts.items())[: self.config.codebook_max])
        similar = [mean_similarity(list(texts), group, self.config.tokenizer) for group in self._groups]
        best = max(range(len(similar)), key=lambda i: similar[i], default=None)
        if best is not None and similar[best] >= self.config.sim_threshold:
            self._own = self._groups[best]
            self._start_from(ctx, self._own.tasks[-1])
        else:
            self._own = Group(f"group_{len(self._groups) + 1}")
            self._groups.append(self._own)
            if ctx.earlier and self.config.new_group_init == "fresh":
                reset(model, ctx.seed, ctx.task)
        self._report(ctx, texts, similar)
        self._own.add(ctx.task, texts, self.config.codebook_max)
        return model

    def _report(self, ctx: TaskContext, texts: Mapping[str, int], similar: Sequence[float]) -> None:
        assert self._own is not None
        joined = f"joins {self._own.name} ({', '.join(self._own.tasks)})" if self._own.tasks else "opens a new group"
        nearest = f", the nearest group's similarity is {max(similar):.3f}" if similar else ""
        ctx.notice(f"task '{ctx.task}' {joined}{nearest}; an instruction of it: {next(iter(texts), '')[:80]!r}")
        if self.config.tokenizer == "word" and any(cjk_share(text) > MUCH_CJK for text in texts):
            ctx.notice("instructions are compared by characters: they have no word borders")

    def _start_from(self, ctx: TaskContext, task: str) -> None:
        """The adapter of an earlier task, in place of the last one's, which the stage was loaded with."""
        folder = next(earlier.weights_dir for earlier in ctx.earlier if earlier.task == task)
        if folder == ctx.earlier[-1].weights_dir:
            return
        start_from(self.name, ctx, folder)

    # --- the average -------------------------------------------------------------------------------------------------

    def train_begin(self, ctx: TaskContext) -> None:
        if not ctx.earlier or (self._own is not None and len(self._own.tasks) == 1):
            return
        weights = ctx.weights()
        check_shapes(self.name, ctx.previous_state().meta["parameters"], shapes_of(weights))
        device = next(iter(weights.values())).device
        self._run = Running(
            ema=_copies(weights),
            start={name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()},
            before=_copies(weights) if self.config.variant == "paper" else {},
            last_gradient=None,
            sums=torch.zeros(2, device=device),
        )

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        if self._run is not None and self.config.variant != "fixed":
            assert grads.names == list(self._run.ema)
            # A copy: the engine may hand out its own buffer, and clipping changes that after this hook.
            self._gradient = grads.flat().detach().clone()

    def after_step(self, ctx: TaskContext) -> None:
        run = self._run
        if run is None:
            return
        weights = ctx.weights()
        live = [weights[name] for name in run.ema]
        weight, fallback = self._weight_of_new(run, live)
        torch._foreach_lerp_(list(run.ema.values()), live, list(weight.unbind()))
        if run.before:
            torch._foreach_copy_(list(run.before.values()), live)
        run.last_gradient = self._gradient
        seen = torch.stack((1 - weight.mean(), fallback.float().mean()))
        ctx.log("cia_beta", seen[0])
        if self.config.variant != "fixed":
            ctx.log("cia_fallback", seen[1])
        run.sums += seen
        run.steps += 1

    def _weight_of_new(self, run: Running, live: "list[Tensor]") -> "tuple[Tensor, Tensor]":
        """(1 - beta, whether it is the fallback) of every tensor."""
        fallback = torch.full((len(live),), 1 - self.config.beta_fallback, device=run.sums.device)
        if self.config.variant == "fixed" or self._gradient is None or run.last_gradient is None:
            return fallback, torch.ones_like(fallback, dtype=torch.bool)
        sizes = [tensor.numel() for tensor in live]
        size = _l1(torch.split(self._gradient, sizes)) + 1
        slope = _l1(torch.split(self._gradient - run.last_gradient, sizes))
        distance = _l1(torch._foreach_sub(live, list(run.ema.values())))
        if self.config.variant == "paper":
            moved = _l1(torch._foreach_sub(live, list(run.before.values())))
            found = size * moved / (distance * slope)
        else:
            found = self.config.scale * size / (distance * slope)
        # A zero denominator gives infinity or NaN, which are not in (0, 1) either.
        usable = (found > 0) & (found < 1)
        weight = 1 - found if self.config.variant == "paper" else found
        return torch.where(usable, weight, fallback), ~usable

    def checkpoint_state(self, ctx: TaskContext) -> MethodState | None:
        run = self._run
        if run is None:
            return None
        tensors = {**pack(ema=run.ema, start=run.start, before=run.before), "sums": run.sums}
        if run.last_gradient is not None:
            tensors["last_gradient"] = run.last_gradient
        meta = {"parameters": shapes_of(run.ema), "variant": self.config.variant, "steps": run.steps}
        return MethodState(tensors, meta)

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        if self._run is None:
            return
        check_shapes(self.name, state.meta["parameters"], shapes_of(self._run.ema))
        if state.meta["variant"] != self.config.variant:
            raise UserError(
                f"--cia_variant is {self.config.variant!r}, but the checkpoint was trained with "
                f"{state.meta['variant']!r}"
            )
        device = self._run.sums.device
        order = list(self._run.ema)
        on_device = {name: tensor.to(device) for name, tensor in state.tensors.items() if not name.startswith("start/")}
        ema, before, start = unpack(on_device, "ema"), unpack(on_device, "before"), unpack(state.tensors, "start")
        self._run = Running(
            ema={name: ema[name] for name in order},
            start={name: start[name] for name in order},
            before={name: before[name] for name in order if before},
            last_gradient=on_device.get("last_gradient"),
            sums=on_device["sums"],
            steps=state.meta["steps"],
        )

    def end_task(self, ctx: TaskContext) -> MethodState:
        weights = ctx.weights()
        meta: dict[str, Any] = {"parameters": shapes_of(weights), "variant": self.config.variant}
        if self.config.grouping:
            meta["groups"] = [group.as_json() for group in self._groups]
        meta.update(mean_beta=None, fallback_share=None, ratio=None)
        run = self._run
        if run is not None and run.steps:
            meta["mean_beta"], share = (run.sums / run.steps).tolist()
            meta["fallback_share"] = None if self.config.variant == "fixed" else share
            moved = _distance(weights, run.start)
            if moved > 0:
                ratio = meta["ratio"] = _distance(run.ema, run.start) / moved
                if ratio > PLAIN:
                    ctx.notice(
                        f"the kept average went {ratio:.3f} of the way of the plain weights (mean beta "
                        f"{meta['mean_beta']:.3f}), so it protects next to nothing; try --cia_variant fixed"
                    )
        return MethodState(meta=meta)

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        return tensors if self._run is None else {**tensors, **self._run.ema}

    # --- inference ---------------------------------------------------------------------------------------------------

    def routes(self) -> bool:
        return self.config.grouping

    def candidates(self, ctx: TaskContext) -> list[Candidate]:
        folders = {stage.task: stage.weights_dir for stage in (*ctx.earlier, ctx.this_stage)}
        return [Candidate(group.name, tuple(group.tasks), folders[group.tasks[-1]]) for group in self._groups]

    def route(self, ctx: RouteContext, requests: Sequence[RouteRequest]) -> list[Route]:
        """By text alone: no model is run."""
        groups = [group_from(value) for value in ctx.state().meta["groups"]]
        return [self._route(request, groups) for request in requests]

    def _route(self, request: RouteRequest, groups: Sequence[Group]) -> Route:
        text = instruction(str(request.messages[-1]["content"]), request.system, self.config.instruction)
        scores = {group.name: mean_similarity([text], group, self.config.tokenizer) for group in groups}
        best = largest(scores)
        if scores[best] < self.config.sim_threshold and self.config.no_match != "best":
            if self.config.no_match == "error":
                raise UserError(
                    f"no group of instructions is near enough (--cia_no_match error): {text[:80]!r} has at most "
                    f"{scores[best]:.3f}, the threshold is {self.config.sim_threshold}"
                )
            best = groups[-1].name
        return Route(best, scores)


def reset(model: Any, seed: int, task: str) -> None:
    """Give the trained adapter the values that a new one begins with."""
    from peft.tuners.lora import LoraLayer

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed32("cia", seed, task))
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.reset_lora_parameters(TRAINED, True)


def _copies(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _l1(tensors: "Iterable[Tensor]") -> "Tensor":
    """Sum of absolute values of each tensor."""
    return torch.stack(torch._foreach_norm(list(tensors), 1))


def _distance(tensors: "Mapping[str, Tensor]", start: "Mapping[str, Tensor]") -> float:
    """Euclidean distance over all tensors, summed in fp64."""
    squares = (float((tensors[name].cpu().double() - old.double()).square().sum()) for name, old in start.items())
    return math.sqrt(sum(squares))
