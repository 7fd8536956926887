"""cia: Large Continual Instruction Assistant, an average of the weights whose inertia is chosen at every step."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
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

    def validate(self) -> None:
        if not 0 < self.beta_fallback < 1:
            self.fail("cia", "beta_fallback", "a number in (0, 1)")
        if not 0 < self.scale < math.inf:
            self.fail("cia", "scale", "a number > 0")
        if self.variant != "released" and self.scale != CiaConfig.scale:
            self.fail("cia", "scale", "only with --cia_variant released")


class Cia(Method):
    """theta*_t = beta_t theta*_{t-1} + (1 - beta_t) theta_t after every step, one beta a tensor; theta* is kept.

    The live weights are never replaced. Off in the first task, which is plain fine-tuning.
    """

    name: ClassVar[str] = "cia"
    title: ClassVar[str] = "Large Continual Instruction Assistant (dynamic EMA)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10868"
    config_class: ClassVar[type[MethodConfig]] = CiaConfig
    support: ClassVar[Support] = Support(tuners=("lora",), full_deepspeed=(), zero0_low_precision=False)

    config: CiaConfig

    def __init__(self, config: CiaConfig) -> None:
        super().__init__(config)
        self._names: list[str] = []
        # All fp32, one tensor a name: theta*, the weights before the current step, the weights when the task began.
        self._ema: list[Tensor] = []
        self._before: list[Tensor] = []
        self._start: list[Tensor] = []
        # All gradients as one vector: of the current step, and of the last applied one (None before the first).
        self._gradient: Tensor | None = None
        self._last_gradient: Tensor | None = None
        # Sums over steps of (mean beta, share of fallbacks), and their number.
        self._sums: Tensor | None = None
        self._steps = 0

    @property
    def _adaptive(self) -> bool:
        return self.config.variant != "fixed"

    def train_begin(self, ctx: TaskContext) -> None:
        if not ctx.earlier:
            return
        weights = ctx.weights()
        check_shapes(self.name, ctx.previous_state().meta["parameters"], shapes_of(weights))
        self._names = list(weights)
        live = list(weights.values())
        self._ema = [weight.detach().clone() for weight in live]
        self._start = [weight.detach().to("cpu", copy=True) for weight in live]
        self._sums = torch.zeros(2, device=live[0].device)
        if self._adaptive:
            self._before = [weight.detach().clone() for weight in live]

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        if self._names and self._adaptive:
            assert grads.names == self._names
            # A copy: the engine may hand out its own buffer, and clipping changes it after this hook.
            self._gradient = grads.flat().detach().clone()

    def after_step(self, ctx: TaskContext) -> None:
        if not self._names:
            return
        weights = ctx.weights()
        live = [weights[name] for name in self._names]
        if self._adaptive:
            beta, fallback = self._betas(live)
            # lerp(theta*, theta, 1 - beta) = beta theta* + (1 - beta) theta
            torch._foreach_lerp_(self._ema, live, list((1 - beta).unbind()))
            torch._foreach_copy_(self._before, live)
            self._last_gradient = self._gradient
            share = fallback.float().mean()
        else:
            torch._foreach_lerp_(self._ema, live, 1 - self.config.beta_fallback)
            assert self._sums is not None
            beta = torch.full_like(self._sums[:1], self.config.beta_fallback)
            share = torch.zeros_like(self._sums[0])
        mean = beta.mean()
        ctx.log("cia_beta", mean)
        ctx.log("cia_fallback", share)
        self._sums = self._sums + torch.stack((mean, share)) if self._sums is not None else None
        self._steps += 1

    def _betas(self, live: "list[Tensor]") -> "tuple[Tensor, Tensor]":
        """(beta, whether it is the fallback) of every tensor."""
        assert self._gradient is not None
        distance = _l1(torch._foreach_sub(live, self._ema))
        if self._last_gradient is None:
            missing = torch.ones_like(distance, dtype=torch.bool)
            return torch.full_like(distance, self.config.beta_fallback), missing
        sizes = [tensor.numel() for tensor in live]
        slope = _l1((self._gradient - self._last_gradient).split(sizes))
        size = _l1(self._gradient.split(sizes)) + 1
        if self.config.variant == "paper":
            moved = _l1(torch._foreach_sub(live, self._before))
            beta = size * moved / (distance * slope)
        else:
            beta = 1 - self.config.scale * size / (distance * slope)
        # A zero denominator gives infinity or NaN, which are not in (0, 1) either.
        fallback = ~((beta > 0) & (beta < 1))
        return torch.where(fallback, self.config.beta_fallback, beta), fallback

    def checkpoint_state(self, ctx: TaskContext) -> MethodState | None:
        if not self._names:
            return None
        groups = {"ema": self._by_name(self._ema), "start": self._by_name(self._start)}
        if self._adaptive:
            groups["before"] = self._by_name(self._before)
        tensors = pack(**groups)
        if self._last_gradient is not None:
            tensors["last_gradient"] = self._last_gradient
        assert self._sums is not None
        tensors["sums"] = self._sums
        parameters = shapes_of(groups["ema"])
        return MethodState(tensors, {"parameters": parameters, "variant": self.config.variant, "steps": self._steps})

    def restore_checkpoint(self, ctx: TaskContext, state: MethodState) -> None:
        if not self._names:
            return
        check_shapes(self.name, state.meta["parameters"], shapes_of(self._by_name(self._ema)))
        self._ema = self._restored(state, "ema", self._ema)
        self._start = self._restored(state, "start", self._start)
        if self._adaptive:
            self._before = self._restored(state, "before", self._before)
            last = state.tensors.get("last_gradient")
            self._last_gradient = None if last is None else last.to(self._ema[0].device)
        self._sums = state.tensors["sums"].to(self._ema[0].device)
        self._steps = state.meta["steps"]

    def _by_name(self, tensors: "list[Tensor]") -> "dict[str, Tensor]":
        return dict(zip(self._names, tensors, strict=True))

    def _restored(self, state: MethodState, group: str, like: "list[Tensor]") -> "list[Tensor]":
        stored = unpack(state.tensors, group)
        return [stored[name].to(tensor.device) for name, tensor in zip(self._names, like, strict=True)]

    def end_task(self, ctx: TaskContext) -> MethodState:
        weights = ctx.weights()
        meta: dict[str, Any] = {"parameters": shapes_of(weights), "variant": self.config.variant}
        meta.update(mean_beta=None, fallback_share=None, ratio=None)
        if self._names and self._steps:
            assert self._sums is not None
            mean, share = (self._sums / self._steps).tolist()
            meta["mean_beta"], meta["fallback_share"] = mean, share if self._adaptive else None
            meta["ratio"] = self._ratio([weights[name] for name in self._names])
            if meta["ratio"] is not None and meta["ratio"] > PLAIN:
                ctx.notice(
                    f"the kept average moved {meta['ratio']:.3f} of the way of the plain weights (mean beta {mean:.3f}): "
                    "it protects almost nothing; try --cia_variant fixed or another --cia_scale"
                )
        return MethodState(meta=meta)

    def _ratio(self, live: "list[Tensor]") -> float | None:
        """|theta* - theta_old| / |theta - theta_old| over all tensors; None if nothing moved."""
        kept, plain = (
            sum(float((t.cpu() - start).double().square().sum()) for t, start in zip(tensors, self._start, strict=True))
            for tensors in (self._ema, live)
        )
        return math.sqrt(kept / plain) if plain > 0 else None

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        return {**tensors, **self._by_name(self._ema)} if self._names else tensors


def _l1(tensors: "Any") -> "Tensor":
    """Sum of absolute values of each tensor."""
    return torch.stack(torch._foreach_norm(list(tensors), 1))
