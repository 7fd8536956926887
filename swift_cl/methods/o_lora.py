"""o_lora: a new LoRA for every task, kept orthogonal to those of earlier tasks, which stay frozen and active.

Not to be confused with OLoRA, an initialisation of PEFT.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapter_history import AdapterHistory
from swift_cl.methods._adapters import is_lora_a
from swift_cl.methods._orthogonality import FORMS, overlap
from swift_cl.methods._state import check_shapes, pack, shapes_of, unpack
from swift_cl.methods.base import Gradients, Method, MethodConfig, Support, TaskContext, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

_EPSILON = 1e-12


@dataclass
class OLoraConfig(MethodConfig):
    """Flags of `o_lora`."""

    lambda1: float = setting(0.5, "Strength of the orthogonality to earlier tasks, >= 0.")
    lambda2: float = setting(0.0, "Strength of the norm of the new matrices A and B (not squared), >= 0.")
    form: str = setting(
        "squared",
        "What is small when a new A is orthogonal to the old ones: 'squared' as in the paper's objective, 'l1' as in "
        "the released code, or 'basis' (the share of each row in the old rows' span, which a small A cannot lower).",
        (*FORMS, "basis"),
    )
    max_rank: int = setting(
        0,
        "Largest rank of the kept adapter, >= 0; 0 for no limit; beyond it the best approximation of it is kept.",
    )
    basis_rank: int = setting(
        0,
        "Directions remembered per layer, >= 0; 0 for all of them; beyond it, those of the largest energy are kept.",
    )

    def validate(self) -> None:
        for name in ("lambda1", "lambda2"):
            if not 0 <= getattr(self, name) < math.inf:
                self.fail("o_lora", name, "a number >= 0")
        for name in ("max_rank", "basis_rank"):
            if getattr(self, name) < 0:
                self.fail("o_lora", name, "a whole number >= 0")


class OLora(Method):
    """CE + lambda1 sum over modules of |A_t C|_F^2, where C C' = sum over earlier tasks of A_i' A_i; pairs are summed.

    The kept adapter is one LoRA that holds all pairs (see `AdapterHistory`).
    """

    name: ClassVar[str] = "o_lora"
    title: ClassVar[str] = "Orthogonal LoRA (O-LoRA)"
    summary: ClassVar[str] = "a new LoRA per task, orthogonal to the frozen ones of earlier tasks; all are summed"
    cost: ClassVar[str] = "about 1.0x"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.14152"
    config_class: ClassVar[type[MethodConfig]] = OLoraConfig
    support: ClassVar[Support] = Support(
        tuners=("lora",), full_deepspeed=(), zero0_low_precision=False, encoder_decoder=True
    )
    starts_fresh: ClassVar[bool] = True

    config: OLoraConfig

    def __init__(self, config: OLoraConfig) -> None:
        super().__init__(config)
        self._spans: dict[str, Tensor] = {}  # C by name of A, [in, q]; empty in the first task
        self._history = AdapterHistory(self.name, "o_lora_max_rank", config.max_rank)

    # --- the model ---------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        self._history.load(ctx, model)
        return model

    def train_begin(self, ctx: TaskContext) -> None:
        if not ctx.earlier:
            return
        spans = unpack(ctx.previous_state().tensors, "span")
        weights = {name: weight for name, weight in ctx.weights().items() if is_lora_a(name)}
        widths = {name: [weight.shape[1]] for name, weight in weights.items()}
        check_shapes(self.name, {name: [span.shape[0]] for name, span in spans.items()}, widths)
        self._spans = {name: self._seen(spans[name]).to(weight.device) for name, weight in weights.items()}

    def _seen(self, span: "Tensor") -> "Tensor":
        """C, or for the form 'basis' an orthonormal basis of its columns, which counts no direction twice."""
        if self.config.form != "basis":
            return span
        u, s, _ = torch.linalg.svd(span.double(), full_matrices=False)
        basis: Tensor = u[:, s > s.max() * 1e-6].float()
        return basis

    # --- training ----------------------------------------------------------------------------------------------------

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        if not self._spans:
            return
        # As the forward has them: in bf16 the products lose nothing that matters, and no rank has to ask another.
        weights = ctx.live_weights()
        terms = {name: self.penalty(weights[name], span) for name, span in self._spans.items()}
        share = 1 / len(terms) if self.config.form == "basis" else 1.0
        if self.config.lambda1 > 0:
            slopes = {name: self.config.lambda1 * share * slope for name, (_, slope) in terms.items()}
            for name, part in ctx.parts_of(slopes).items():
                grads.add_part(name, part)
        norms = {name: (weight.square().sum() + _EPSILON).sqrt() for name, weight in weights.items()}
        if self.config.lambda2 > 0:
            pulls = {name: self.config.lambda2 * weights[name] / norm for name, norm in norms.items()}
            for name, part in ctx.parts_of(pulls).items():
                grads.add_part(name, part)
        if ctx.is_logging_step:
            value = torch.stack([value for value, _ in terms.values()]).sum() * share
            ctx.log("o_lora_overlap", value)
            total = self.config.lambda1 * value + self.config.lambda2 * torch.stack(list(norms.values())).sum()
            ctx.log("o_lora_penalty", total)

    def penalty(self, a: "Tensor", span: "Tensor") -> "tuple[Tensor, Tensor]":
        """(value, gradient) of one module's term.

        Args:
            a: [rank, in], fp32, the new A.
            span: [in, q], C of the earlier tasks (an orthonormal basis for the form 'basis').
        """
        if self.config.form in FORMS:
            return overlap(a, span, self.config.form)
        products = a @ span
        # With rows a: mean of |a Q|^2 / |a|^2; the second term takes out what only changes a row's length.
        squares = a.square().sum(dim=1, keepdim=True).clamp(min=_EPSILON)
        inside = products.square().sum(dim=1, keepdim=True) / squares
        slope = 2 / len(a) * (products @ span.T - inside * a) / squares
        return inside.mean(), slope

    # --- what is kept ------------------------------------------------------------------------------------------------

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        return self._history.with_new(ctx, tensors)

    def export_config(self, ctx: TaskContext, config: dict[str, Any]) -> dict[str, Any]:
        return self._history.config(config)

    def end_task(self, ctx: TaskContext) -> MethodState:
        spans = unpack(ctx.previous_state().tensors, "span") if ctx.earlier else {}
        weights = {name: weight.detach().cpu() for name, weight in ctx.weights().items() if is_lora_a(name)}
        shares: list[float] = []
        for name, weight in weights.items():
            span = torch.cat([spans[name], weight.T], dim=1) if name in spans else weight.T.clone()
            if 0 < self.config.basis_rank < span.shape[1]:
                span, share = strongest(span, self.config.basis_rank)
                shares.append(share)
            spans[name] = span.contiguous()
        if shares:
            ctx.notice(f"{self.config.basis_rank} directions per layer keep {min(shares):.3g} or more of the energy")
        return MethodState(pack(span=spans), {"spans": shapes_of(spans)})


def strongest(span: "Tensor", rank: int) -> "tuple[Tensor, float]":
    """(C of that many columns nearest to C C', share of the energy kept)."""
    u, s, _ = torch.linalg.svd(span.double(), full_matrices=False)
    energy = s.square()
    return (u[:, :rank] * s[:rank]).float(), float(energy[:rank].sum() / energy.sum())
