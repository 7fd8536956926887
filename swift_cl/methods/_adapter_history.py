"""A new LoRA for every task beside those of earlier tasks, which stay frozen and active, and are kept as one adapter.

The kept adapter holds all pairs: A stacked, B side by side, alpha scaled with the rank. It is what is served, and what
the next task loads as its frozen history.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swift_cl.errors import UserError
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import (
    TRAINED,
    activate,
    check_plain_lora,
    is_lora_a,
    load_frozen_adapter,
    lora_twin,
    redraw,
)
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
        config = one_rank(self._method, model)
        self.ranks = (config.r, config.r)
        if 0 < self._limit < config.r:
            raise UserError(f"--{self._limit_flag} is {self._limit}, allowed: 0, or at least --lora_rank ({config.r})")
        if not ctx.earlier:
            return
        redraw(model, self._method, ctx.seed, ctx.task)
        folder = ctx.earlier[-1].weights_dir
        load_frozen_adapter(model, folder, HISTORY)
        activate(model, TRAINED, HISTORY)
        from safetensors.torch import load_file

        self.pairs = {
            name.removeprefix("base_model.model."): tensor.float()
            for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        }
        old = model.peft_config[HISTORY]
        self.gain = scaling_of(vars(old)) / scaling_of(vars(config))
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
            a, b = stacked((self.pairs[name], self.pairs[twin] * self.gain), (new_a, new_b))
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
        return widened(config, self.ranks[1])


def one_rank(method: str, model: Any) -> Any:
    """The configuration of the trained adapter, which must have one rank and one alpha for all layers."""
    config = model.peft_config[TRAINED]
    if config.rank_pattern or config.alpha_pattern:
        raise UserError(
            f"method '{method}' needs one rank and one alpha for all layers, not rank_pattern or alpha_pattern"
        )
    return config


def stacked(first: "tuple[Tensor, Tensor]", second: "tuple[Tensor, Tensor]") -> "tuple[Tensor, Tensor]":
    """The pair (A, B) whose product is the sum of two pairs' products; its rank is the sum of theirs."""
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]], dim=1)


def widened(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """An adapter_config.json with another rank and the same scaling."""
    if config["r"] == rank:
        return config
    growth = math.sqrt(rank / config["r"]) if config.get("use_rslora") else rank / config["r"]
    alpha = config["lora_alpha"] * growth
    return {**config, "r": rank, "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha}


def joined(
    first: "Mapping[str, Tensor]", first_config: dict[str, Any], second: "Mapping[str, Tensor]", second_config: Any
) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Two LoRA adapters as one that adds what both add: (tensors in the dtypes of the first, adapter_config.json).

    Args:
        first, second: tensors by name; of the same layers.
        first_config, second_config: their adapter_config.json; the result's is the first one's, of the summed rank.
    """
    gain = scaling_of(second_config) / scaling_of(first_config)
    tensors: dict[str, Tensor] = {}
    for name in filter(is_lora_a, first):
        twin = lora_twin(name)
        one = (first[name].float(), first[twin].float())
        a, b = stacked(one, (second[name].float(), second[twin].float() * gain))
        tensors[name], tensors[twin] = a.to(first[name].dtype), b.to(first[twin].dtype)
    return tensors, widened(first_config, first_config["r"] + second_config["r"])


def scaling_of(config: Mapping[str, Any]) -> float:
    """What an adapter_config.json multiplies B A with."""
    rank = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return float(config["lora_alpha"] / rank)


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
