"""A new LoRA for every task beside those of earlier tasks, which stay frozen and active, and are kept as one adapter.

The kept adapter holds all pairs: A stacked, B side by side, alpha scaled with the rank. It is what is served, and what
the next task loads as its frozen history.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swift_cl.errors import UserError
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import TRAINED, activate, check_plain_lora, is_lora_a, load_frozen_adapter, lora_twin
from swift_cl.methods.base import TaskContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

HISTORY = "hist"


class AdapterHistory:
    """The pairs of earlier tasks.

    Args:
        method: for errors.
        limit_flag: name of the flag that caps the rank of the kept adapter.
        limit: its value; 0 for no limit.

    Attributes:
        pairs: by name, as they are in their file, fp32; empty in the first task.
        gain: scaling of the history's pairs over that of the new one.
        ranks: of the new adapter, of the kept one.
    """

    def __init__(self, method: str, limit_flag: str, limit: int) -> None:
        self._method, self._limit_flag, self._limit = method, limit_flag, limit
        self.pairs: dict[str, Tensor] = {}
        self.gain = 1.0
        self.ranks: tuple[int, int] = (0, 0)

    def load(self, ctx: TaskContext, model: Any) -> None:
        """Check the new adapter; from the second task on, add the history to the model, active and frozen."""
        check_plain_lora(self._method, ctx.parameters)
        config = model.peft_config[TRAINED]
        if config.rank_pattern or config.alpha_pattern:
            raise UserError(
                f"method '{self._method}' needs one rank and one alpha for all layers, not rank_pattern or "
                "alpha_pattern"
            )
        self.ranks = (config.r, config.r)
        if 0 < self._limit < config.r:
            raise UserError(f"--{self._limit_flag} is {self._limit}, allowed: 0, or at least --lora_rank ({config.r})")
        if not ctx.earlier:
            return
        folder = ctx.earlier[-1].weights_dir
        load_frozen_adapter(model, folder, HISTORY)
        activate(model, TRAINED, HISTORY)
        from safetensors.torch import load_file

        self.pairs = {
            name.removeprefix("base_model.model."): tensor.float()
            for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        }
        old = model.peft_config[HISTORY]
        self.gain = _scaling(old.r, old.lora_alpha, old.use_rslora) / _scaling(
            config.r, config.lora_alpha, config.use_rslora
        )
        self.ranks = (config.r, min(config.r + old.r, self._limit or config.r + old.r))

    def with_new(self, ctx: TaskContext, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """History and new pair as one adapter, of `ranks[1]`."""
        kept = dict(tensors)
        if not self.pairs:
            return kept
        lost: list[float] = []
        for name in filter(is_lora_a, tensors):
            twin = lora_twin(name)
            new_a, new_b = (tensors[key].detach().to("cpu", torch.float32) for key in (name, twin))
            a = torch.cat([self.pairs[name], new_a])
            b = torch.cat([self.pairs[twin] * self.gain, new_b], dim=1)
            if len(a) > self.ranks[1]:
                a, b, error = truncated(a, b, self.ranks[1])
                lost.append(error)
            kept[name], kept[twin] = a.to(tensors[name].dtype), b.to(tensors[twin].dtype)
        if lost:
            ctx.notice(
                f"the adapters of {ctx.task_index + 1} tasks were cut to rank {self.ranks[1]}: a relative error of "
                f"{sum(lost) / len(lost):.3g} per layer, {max(lost):.3g} at most"
            )
        return kept

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The adapter_config.json of what `with_new` gives."""
        new, kept = self.ranks
        if kept == new:
            return config
        growth = math.sqrt(kept / new) if config.get("use_rslora") else kept / new
        alpha = config["lora_alpha"] * growth
        return {**config, "r": kept, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha}


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


def _scaling(rank: int, alpha: float, rank_stabilised: bool) -> float:
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)
