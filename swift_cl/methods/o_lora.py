"""o_lora: a new LoRA for every task, kept orthogonal to those of earlier tasks, which stay frozen and active.

Not to be confused with OLoRA, an initialisation of PEFT.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import TRAINED, activate, check_plain_lora, is_lora_a, load_frozen_adapter, lora_twin
from swift_cl.methods._state import check_shapes, pack, shapes_of, unpack
from swift_cl.methods.base import Gradients, Method, MethodConfig, Support, TaskContext, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

HISTORY = "hist"
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
        ("squared", "l1", "basis"),
    )
    max_rank: int = setting(
        0, "Largest rank of the kept adapter, 0 for no limit; beyond it, the best approximation of that rank is kept."
    )
    basis_rank: int = setting(
        0, "Directions remembered per layer, 0 for all of them; beyond it, those of the largest energy are kept."
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

    The kept adapter is one LoRA that holds all pairs: A stacked, B side by side, alpha scaled with the rank. It is what
    is served, and what the next task loads as its frozen history.
    """

    name: ClassVar[str] = "o_lora"
    title: ClassVar[str] = "Orthogonal LoRA (O-LoRA)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.14152"
    config_class: ClassVar[type[MethodConfig]] = OLoraConfig
    support: ClassVar[Support] = Support(tuners=("lora",), full_deepspeed=(), zero0_low_precision=False)
    starts_fresh: ClassVar[bool] = True

    config: OLoraConfig

    def __init__(self, config: OLoraConfig) -> None:
        super().__init__(config)
        self._spans: dict[str, Tensor] = {}  # C by name of A, [in, q]; empty in the first task
        self._history: dict[str, Tensor] = {}  # the kept pairs of earlier tasks by name, as they are in their file
        self._gain = 1.0  # scaling of the history's pairs over that of the new one
        self._ranks: tuple[int, int] = (0, 0)  # of the new adapter, of the kept one

    # --- the model ---------------------------------------------------------------------------------------------------

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        check_plain_lora(self.name, ctx.parameters)
        config = model.peft_config[TRAINED]
        if config.rank_pattern or config.alpha_pattern:
            raise UserError(
                "method 'o_lora' needs one rank and one alpha for all layers, not rank_pattern or alpha_pattern"
            )
        self._ranks = (config.r, config.r)
        if 0 < self.config.max_rank < config.r:
            self.config.fail(self.name, "max_rank", f"0, or at least --lora_rank ({config.r})")
        if not ctx.earlier:
            return model
        folder = ctx.earlier[-1].weights_dir
        load_frozen_adapter(model, folder, HISTORY)
        activate(model, TRAINED, HISTORY)
        from safetensors.torch import load_file

        self._history = {
            name.removeprefix("base_model.model."): tensor.float()
            for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        }
        old = model.peft_config[HISTORY]
        self._gain = _scaling(old.r, old.lora_alpha, old.use_rslora) / _scaling(
            config.r, config.lora_alpha, config.use_rslora
        )
        limit = self.config.max_rank or config.r + old.r
        self._ranks = (config.r, min(config.r + old.r, limit))
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
        weights = ctx.weights()
        terms = {name: self.penalty(weights[name], span) for name, span in self._spans.items()}
        share = 1 / len(terms) if self.config.form == "basis" else 1.0
        if self.config.lambda1 > 0:
            for name, (_, slope) in terms.items():
                grads[name] = grads[name] + self.config.lambda1 * share * slope
        norms = {name: (weight.square().sum() + _EPSILON).sqrt() for name, weight in weights.items()}
        if self.config.lambda2 > 0:
            for name, norm in norms.items():
                grads[name] = grads[name] + self.config.lambda2 * weights[name] / norm
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
        products = a @ span
        if self.config.form == "squared":
            return products.square().sum(), 2 * products @ span.T
        if self.config.form == "l1":
            return products.abs().sum(), products.sign() @ span.T
        # With rows a: mean of |a Q|^2 / |a|^2; the second term takes out what only changes a row's length.
        squares = a.square().sum(dim=1, keepdim=True).clamp(min=_EPSILON)
        inside = products.square().sum(dim=1, keepdim=True) / squares
        slope = 2 / len(a) * (products @ span.T - inside * a) / squares
        return inside.mean(), slope

    # --- what is kept ------------------------------------------------------------------------------------------------

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        if not self._history:
            return tensors
        kept = dict(tensors)
        lost: list[float] = []
        for name in filter(is_lora_a, tensors):
            twin = lora_twin(name)
            new_a, new_b = (tensors[key].detach().to("cpu", torch.float32) for key in (name, twin))
            a = torch.cat([self._history[name], new_a])
            b = torch.cat([self._history[twin] * self._gain, new_b], dim=1)
            if len(a) > self._ranks[1]:
                a, b, error = truncated(a, b, self._ranks[1])
                lost.append(error)
            kept[name], kept[twin] = a.to(tensors[name].dtype), b.to(tensors[twin].dtype)
        if lost:
            ctx.notice(
                f"the adapters of {ctx.task_index + 1} tasks were cut to rank {self._ranks[1]}: a relative error of "
                f"{sum(lost) / len(lost):.3g} per layer, {max(lost):.3g} at most"
            )
        return kept

    def export_config(self, ctx: TaskContext, config: dict[str, Any]) -> dict[str, Any]:
        new, kept = self._ranks
        if kept == new:
            return config
        growth = math.sqrt(kept / new) if config.get("use_rslora") else kept / new
        alpha = config["lora_alpha"] * growth
        return {**config, "r": kept, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha}

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


def truncated(a: "Tensor", b: "Tensor", rank: int) -> "tuple[Tensor, Tensor, float]":
    """The best approximation of B A of a lower rank (Eckart and Young).

    Returns:
        A [rank, in], B [out, rank], and the relative Frobenius error.
    """
    # B A = Qb (Rb Ra') Qa': the decomposition of a small matrix instead of one of [out, in].
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = s[:rank].sqrt()
    total = float(s.square().sum().sqrt())
    error = float(s[rank:].square().sum().sqrt()) / total if total > 0 else 0.0
    new_a, new_b = (root[:, None] * vh[:rank]) @ qa.T, qb @ u[:, :rank] * root
    return _filled(new_a.float(), rank), _filled(new_b.T.float(), rank).T.contiguous(), error


def _filled(rows: "Tensor", rank: int) -> "Tensor":
    """Zero rows up to the rank, where the matrix itself is narrower."""
    return torch.cat([rows, rows.new_zeros(rank - len(rows), rows.shape[1])])


def strongest(span: "Tensor", rank: int) -> "tuple[Tensor, float]":
    """(C of that many columns nearest to C C', share of the energy kept)."""
    u, s, _ = torch.linalg.svd(span.double(), full_matrices=False)
    energy = s.square()
    return (u[:, :rank] * s[:rank]).float(), float(energy[:rank].sum() / energy.sum())


def _scaling(rank: int, alpha: float, rank_stabilised: bool) -> float:
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)
