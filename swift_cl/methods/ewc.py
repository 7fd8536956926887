"""ewc: Elastic Weight Consolidation, a quadratic pull towards the weights that earlier tasks needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import RunFailure, UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import is_peft
from swift_cl.methods._answers import IGNORED, predicted, predicted_tokens, unlabelled
from swift_cl.methods._draws import permutation, seed32
from swift_cl.methods._state import check_shapes, pack, shapes_of, unpack
from swift_cl.methods.base import Gradients, Method, MethodConfig, Support, TaskContext, setting
from swift_cl.progress import with_bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

INERT, FROZEN = 1e-3, 10.0


@dataclass
class EwcConfig(MethodConfig):
    """Flags of `ewc`."""

    lambda_: float = setting(5000.0, "Strength of the pull towards the weights of earlier tasks, >= 0.")
    mode: str = setting(
        "separate",
        "'separate' keeps one penalty per earlier task (as one exact quadratic); 'online' keeps a decaying Fisher and "
        "the latest weights.",
        ("separate", "online"),
    )
    gamma: float = setting(0.95, "Decay of the older Fisher at each task, in (0, 1]; only with mode 'online'.")
    fisher: str = setting(
        "sampled",
        "Labels of the Fisher: 'sampled' from the model's own softmax (the Fisher), or 'empirical' (the gold labels).",
        ("sampled", "empirical"),
    )
    fisher_norm: str = setting(
        "token",
        "Sum of squared gradients divided by answer tokens ('token'), by rows ('sample'), or so that its mean is 1 "
        "('mean', then try lambda 0.01 to 10).",
        ("token", "sample", "mean"),
    )
    fisher_samples: int = setting(512, "Rows of the task that the Fisher is measured on, >= 1; at most all.")
    seed: int = setting(0, "Seed of the rows and of the sampled labels, >= 0.")

    def validate(self) -> None:
        if not 0 <= self.lambda_ < math.inf:
            self.fail("ewc", "lambda_", "a number >= 0")
        if not 0 < self.gamma <= 1:
            self.fail("ewc", "gamma", "a number in (0, 1]")
        if self.mode != "online" and self.gamma != EwcConfig.gamma:
            self.fail("ewc", "gamma", "only with --ewc_mode online")
        if self.fisher_samples < 1:
            self.fail("ewc", "fisher_samples", "a whole number >= 1")
        if self.seed < 0:
            self.fail("ewc", "seed", "a whole number >= 0")


@dataclass
class Quadratic:
    """lambda/2 (sum_i S_i (theta_i - a_i)^2 + c): what all earlier tasks together say.

    Attributes:
        importance: S by parameter name.
        anchor: a by parameter name.
        offset: c, which shifts the penalty's value and has no gradient.
    """

    importance: "dict[str, Tensor]"
    anchor: "dict[str, Tensor]"
    offset: float = 0.0

    def plus(self, fisher: "Mapping[str, Tensor]", weights: "Mapping[str, Tensor]") -> "Quadratic":
        """The exact sum with sum_i F_i (theta_i - theta*_i)^2, of the same size: a sum of parabolas is a parabola."""
        total = Quadratic({}, {}, self.offset)
        for name, new in fisher.items():
            # fp64 for one tensor at a time: the offset grows over the tasks, the stored tensors are fp32.
            given = (self.importance[name], new, self.anchor[name], weights[name])
            old, added, anchor, weight = (tensor.to(new.device, torch.float64) for tensor in given)
            both = old + added
            # Nothing is known where both are 0; dividing by 1 keeps the anchor there.
            share = added / torch.where(both > 0, both, 1.0)
            gap = weight - anchor
            total.offset += float((old * share * gap.square()).sum())
            total.importance[name] = both.float()
            total.anchor[name] = (anchor + share * gap).float()
        return total

    def decayed(self, gamma: float, fisher: "Mapping[str, Tensor]", weights: "Mapping[str, Tensor]") -> "Quadratic":
        """The online form: gamma S + F around the latest weights."""
        importance = {name: gamma * self.importance[name].to(new.device) + new for name, new in fisher.items()}
        return Quadratic(importance, dict(weights))


class Ewc(Method):
    """CE + lambda/2 sum_k sum_i F_ki (theta_i - theta*_ki)^2, its gradient added once per optimizer step in fp32."""

    name: ClassVar[str] = "ewc"
    title: ClassVar[str] = "Elastic Weight Consolidation"
    summary: ClassVar[str] = "quadratic anchor weighted by the diagonal Fisher, separate or online"
    cost: ClassVar[str] = "about 1.0x"
    paper: ClassVar[str] = "https://arxiv.org/abs/1612.00796"
    config_class: ClassVar[type[MethodConfig]] = EwcConfig
    support: ClassVar[Support] = Support(
        tuners=("lora", "full", "moelora"),
        zero0_low_precision=False,
        sequence_parallel=False,
        encoder_decoder=True,
    )
    needs_rows: ClassVar[bool] = True

    config: EwcConfig

    def __init__(self, config: EwcConfig) -> None:
        super().__init__(config)
        self._acts = False
        self._names: list[str] = []  # of what this process has a part of
        self._anchor: list[Tensor] = []
        self._strength: list[Tensor] = []  # lambda S
        self._constant = 0.0  # lambda/2 c
        self._guard_step = 0
        self._ce: Tensor | None = None
        self._ce_weight: Tensor | None = None

    def train_begin(self, ctx: TaskContext) -> None:
        weights = ctx.weights()
        if not is_peft(ctx.model):
            count = sum(weight.numel() for weight in weights.values())
            ctx.notice(
                f"full fine-tuning: importance and anchor of {count} parameters take {8 * count / 2**30:.3g} GiB more"
            )
        if not ctx.earlier or self.config.lambda_ == 0:
            return
        quadratic = self._previous(ctx, weights)
        strength = self.config.lambda_
        here = {name: weight.device for name, weight in weights.items()}
        anchor = ctx.parts_of({name: quadratic.anchor[name].to(device) for name, device in here.items()})
        importance = ctx.parts_of({name: quadratic.importance[name].to(device) for name, device in here.items()})
        self._acts, self._names = True, list(anchor)
        self._anchor = list(anchor.values())
        self._strength = [importance[name] * strength for name in self._names]
        self._constant = strength / 2 * quadratic.offset
        self._guard_step = math.ceil(0.1 * ctx.max_steps)

    def _previous(self, ctx: TaskContext, weights: "Mapping[str, Tensor]") -> Quadratic:
        state = ctx.previous_state()
        check_shapes(self.name, state.meta["parameters"], shapes_of(weights))
        for key in ("mode", "fisher_norm"):
            if state.meta[key] != getattr(self.config, key):
                raise UserError(
                    f"--ewc_{key} is {getattr(self.config, key)!r}, but the state of task '{ctx.earlier[-1].task}' was "
                    f"written with {state.meta[key]!r}; they cannot be added up"
                )
        return Quadratic(unpack(state.tensors, "importance"), unpack(state.tensors, "anchor"), state.meta["offset"])

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        # The penalty is never in the loss (it would be divided by accumulation and multiplied by ranks); this only
        # sums up the cross-entropy that the guard compares with. The weight undoes the Trainer's scaling of `loss`.
        labels = inputs.get("labels")
        if ctx.step < self._guard_step and labels is not None:
            count = (predicted(ctx.module_for_forward, labels) != IGNORED).sum()
            weight = ctx.token_mean(count, count.clamp(min=1))
            self._ce = loss.detach() if self._ce is None else self._ce + loss.detach()
            self._ce_weight = weight if self._ce_weight is None else self._ce_weight + weight
        return None

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        if not self._acts:
            return
        weights = ctx.weight_parts()
        distances = _each(torch._foreach_sub, [weights[name] for name in self._names], self._anchor)
        guarding = ctx.step + 1 == self._guard_step
        if ctx.is_logging_step or guarding:
            penalty = ctx.sum_of_parts(self._penalty(distances, ctx.device))
            ctx.log("ewc_penalty", penalty + self._constant)
            if guarding:
                self._guard(ctx, penalty)
        for name, pull in zip(self._names, _each(torch._foreach_mul, distances, self._strength), strict=True):
            grads.add_part(name, pull)

    def _penalty(self, distances: "Sequence[Tensor]", device: Any) -> "Tensor":
        """Of this process's parts, of which it may have none."""
        pairs = zip(self._strength, distances, strict=True)
        total = torch.zeros((), device=device)
        return sum(((strength * distance.square()).sum() for strength, distance in pairs), total) / 2

    def _guard(self, ctx: TaskContext, penalty: "Tensor") -> None:
        if self._ce is None or self._ce_weight is None:
            return
        ratio = float(penalty * self._ce_weight / self._ce)
        advice = f"the penalty is {ratio:.2g} of the cross-entropy after {self._guard_step} steps"
        if ratio < INERT:
            ctx.notice(f"inert: {advice}; a larger --ewc_lambda than {self.config.lambda_:g} may be needed")
        elif ratio > FROZEN:
            ctx.notice(f"frozen: {advice}; a smaller --ewc_lambda than {self.config.lambda_:g} may be needed")

    def end_task(self, ctx: TaskContext) -> MethodState:
        fisher, rows, tokens = self.fisher(ctx)
        weights = {name: weight.detach().clone() for name, weight in ctx.weights().items()}
        quadratic = Quadratic(fisher, weights)
        if ctx.earlier:
            previous = self._previous(ctx, weights)
            if self.config.mode == "separate":
                quadratic = previous.plus(fisher, weights)
            else:
                quadratic = previous.decayed(self.config.gamma, fisher, weights)
        return MethodState(
            pack(importance=quadratic.importance, anchor=quadratic.anchor),
            {
                "parameters": shapes_of(weights),
                "mode": self.config.mode,
                "fisher_norm": self.config.fisher_norm,
                "offset": quadratic.offset,
                "n_samples": rows,
                "n_tokens": tokens,
            },
        )

    def fisher(self, ctx: TaskContext) -> "tuple[dict[str, Tensor], int, int]":
        """(Fisher diagonal by name, rows, answer tokens) of the current task at the current weights, over all ranks."""
        rows = self._rows(ctx)
        tokens = sum(predicted_tokens(ctx.module_for_forward, row["labels"]) for _, row in rows)
        names = list(ctx.parameters)
        weights = ctx.weights()
        squares = [torch.zeros_like(weights[name]) for name in names]
        with ctx.statistics_mode():
            turns = range(0, len(rows), ctx.world_size)
            for first in with_bar(turns, "ewc: Fisher", "row", shown=ctx.rank == 0):
                # Every rank does the same number of passes (ZeRO-3 gathers in each); a pass too many is not counted.
                position = first + ctx.rank
                index, row = rows[min(position, len(rows) - 1)]
                found = self._gradient_of_row(ctx, names, row, index)
                if position < len(rows):
                    used = [(s, g.float()) for s, g in zip(squares, found, strict=True) if g is not None]
                    torch._foreach_addcmul_([s for s, _ in used], [g for _, g in used], [g for _, g in used])
        for square in squares:
            ctx.all_reduce_sum(square)

        mass = float(torch.stack([square.double().sum() for square in squares]).sum())
        if not 0 < mass < math.inf:
            raise RunFailure(f"ewc: the Fisher of task '{ctx.task}' sums to {mass}; it must be positive and finite")
        count = sum(square.numel() for square in squares)
        scale = {"token": 1 / tokens, "sample": 1 / len(rows), "mean": count / mass}[self.config.fisher_norm]
        torch._foreach_mul_(squares, scale)
        return dict(zip(names, squares, strict=True)), len(rows), tokens

    def _rows(self, ctx: TaskContext) -> list[tuple[int, dict[str, Any]]]:
        """(index, encoded row) of the rows to measure on, the same on every rank; rows without an answer are passed."""
        rows = ctx.training_rows()
        found: list[tuple[int, dict[str, Any]]] = []
        for index in permutation(len(rows), "ewc", self.config.seed):
            if len(found) == self.config.fisher_samples:
                break
            encoded = ctx.encode([rows[index]])[0]
            if encoded and predicted_tokens(ctx.module_for_forward, encoded["labels"]):
                found.append((index, encoded))
        if not found:
            raise RunFailure(f"ewc: none of the {len(rows)} rows of task '{ctx.task}' has an answer to measure on")
        return found

    def _gradient_of_row(
        self, ctx: TaskContext, names: Sequence[str], row: dict[str, Any], index: int
    ) -> "Sequence[Tensor | None]":
        """Gradient of the sum over answer tokens of log p(label)."""
        inputs = dict(ctx.collate([row]))
        module = ctx.module_for_forward
        labels = predicted(module, inputs["labels"])[0]
        answer = labels != IGNORED
        log_p = torch.log_softmax(module(**unlabelled(module, inputs)).logits[0][answer].float(), dim=-1)
        if self.config.fisher == "sampled":
            targets = sampled_labels(log_p.detach(), seed32("ewc", self.config.seed, index))
        else:
            targets = labels[answer]
        total = log_p.gather(-1, targets.unsqueeze(-1)).sum()
        return ctx.gradients_of(total, names)


def sampled_labels(log_p: "Tensor", seed: int) -> "Tensor":
    """One label a position from softmax rows; depends on the seed only, so any number of ranks draws the same."""
    generator = torch.Generator(device=log_p.device).manual_seed(seed)
    return torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(-1)


def _each(work: Any, first: "Sequence[Tensor]", second: "Sequence[Tensor]") -> "Sequence[Tensor]":
    """One of torch's functions on lists, which take no empty ones."""
    return work(first, second) if first else []
