"""slao: one LoRA for all tasks, merged after each task; a new task starts from the last one's orthonormalised A."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import check_plain_lora, is_lora_a
from swift_cl.methods._state import check_shapes, pack, shapes_of, unpack
from swift_cl.methods.base import Method, MethodConfig, Support, TaskContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


@dataclass
class SlaoConfig(MethodConfig):
    """`slao` has no settings of its own."""


class Slao(Method):
    """Train from (Q, B) with Q Q' = I out of the last trained A; keep A_merge = A, B_merge += (B - B_merge) / sqrt(i).

    What is kept, served and recorded as the stage's adapter is the merge; what the next task starts from, the weights
    as they were trained, travels in the state.
    """

    name: ClassVar[str] = "slao"
    title: ClassVar[str] = "Single LoRA, continually merged (SLAO)"
    summary: ClassVar[str] = "one adapter, merged after every task; a task starts from the last one's orthonormalised A"
    cost: ClassVar[str] = "none"
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.23017"
    config_class: ClassVar[type[MethodConfig]] = SlaoConfig
    support: ClassVar[Support] = Support(tuners=("lora",), full_deepspeed=(), encoder_decoder=True)

    def prepare_model(self, ctx: TaskContext, model: Any) -> Any:
        check_plain_lora(self.name, ctx.parameters)
        if not ctx.earlier:
            return model
        state = ctx.previous_state()
        check_shapes(self.name, state.meta["parameters"], shapes_of(ctx.parameters))
        for name, trained in unpack(state.tensors, "trained").items():
            start = orthonormal_rows(trained, name) if is_lora_a(name) else trained
            with torch.no_grad():
                ctx.parameters[name].copy_(start)
        return model

    def export(self, ctx: TaskContext, tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
        if not ctx.earlier:
            return tensors
        merged = unpack(ctx.previous_state().tensors, "merged")
        share = 1 / math.sqrt(ctx.task_index + 1)
        kept = dict(tensors)
        for name, before in merged.items():
            new = tensors[name].detach().to("cpu", torch.float32)
            kept[name] = torch.lerp(before, new, share).to(tensors[name].dtype)
        return kept

    def end_task(self, ctx: TaskContext) -> MethodState:
        trained = {name: weight.detach().cpu() for name, weight in ctx.weights().items()}
        merged = {name: weight.clone() for name, weight in self.export(ctx, trained).items() if not is_lora_a(name)}
        return MethodState(pack(trained=trained, merged=merged), {"parameters": shapes_of(trained)})


def orthonormal_rows(a: "Tensor", name: str) -> "Tensor":
    """Q' of the QR decomposition A' = QR with a positive diagonal of R, which makes it unique.

    Args:
        a: [rank, in], the trained A.
        name: for the error.

    Returns:
        [rank, in], fp32, with orthonormal rows that span the rows of `a`.

    Raises:
        UserError: more rows than columns cannot be orthonormal.
    """
    rank, width = a.shape
    if rank > width:
        raise UserError(f"--lora_rank is {rank}, but {name} has {width} inputs; method 'slao' allows at most as many")
    q, r = torch.linalg.qr(a.detach().cpu().double().T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    basis: Tensor = (q * signs).T.float()
    return basis
