"""moelora: a LoRA split into small experts, mixed for every token by a soft router."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.errors import UserError
from swift_cl.settings import setting
from swift_cl.tuners.base import PLAIN_LORA_ONLY, LoraPair, Tuner, TunerSettings, refuse

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("swift_cl")
PEFT_TYPE = "MOELORA"
DEFAULT_RANK = 8
"""ms-swift's `--lora_rank`."""


@dataclass
class MoELoRASettings(TunerSettings):
    """Flags of `moelora`; rank, alpha, dropout and targets are ms-swift's `--lora_*` and `--target_modules`."""

    num_experts: int = setting(8, "Number of experts, >= 1; it divides --lora_rank, which all of them share.")
    scaling: str = setting(
        "total",
        "Factor of the adapter's output: alpha / rank ('total'), or alpha / (rank of one expert) ('expert').",
        ("total", "expert"),
    )
    router_init: str = setting(
        "default",
        "Start of the routers: random as any linear layer's, or 'zero', which mixes all experts alike at first.",
        ("default", "zero"),
    )

    def validate(self) -> None:
        if self.num_experts < 1:
            self.fail("moe_lora", "num_experts", "a whole number >= 1 that divides --lora_rank")


class MoELoRA(Tuner):
    """y = W x + (alpha / r) B (rep(softmax(R x)) o (A x)), with one gate for the r / E rows of each expert."""

    name: ClassVar[str] = "moelora"
    title: ClassVar[str] = "Mixture of LoRA experts (MoELoRA)"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.08350"
    prefix: ClassVar[str] = "moe_lora"
    config_class: ClassVar[type[TunerSettings]] = MoELoRASettings
    peft_type: ClassVar[str] = PEFT_TYPE
    own_type: ClassVar[bool] = True
    fixed: ClassVar[Mapping[str, str]] = {
        "lora_rank": "r",
        "lora_alpha": "lora_alpha",
        "moe_lora_num_experts": "num_experts",
        "moe_lora_scaling": "scaling",
    }

    @classmethod
    def check_flags(cls, config: Any, given: Mapping[str, list[str]]) -> None:
        refuse(given, cls, {**PLAIN_LORA_ONLY, "target_parameters": ()})
        text = (given.get("lora_rank") or [str(DEFAULT_RANK)])[0]
        rank = int(text) if text.isdigit() else 0  # what is no number is refused by ms-swift
        if rank and rank % config.num_experts != 0:
            raise UserError(
                f"--moe_lora_num_experts is {config.num_experts}, allowed: a whole number that divides --lora_rank "
                f"({rank})"
            )

    @classmethod
    def register(cls) -> None:
        from swift_cl.tuners.moelora.layer import PREFIX
        from swift_cl.tuners.moelora.model import MoELoRAConfig, MoELoRAModel
        from swift_cl.tuners.peft_types import register_type

        register_type(PEFT_TYPE, MoELoRAConfig, MoELoRAModel, PREFIX)

    @classmethod
    def prepare_model(cls, args: Any, config: Any, model: Any) -> Any:
        from peft import get_peft_model
        from swift.pipelines.train.tuner import get_target_modules

        from swift_cl.tuners.moelora.model import MoELoRAConfig

        if args.lora_rank < 2 * config.num_experts and config.num_experts > 1:
            logger.warning(
                f"moelora: --lora_rank {args.lora_rank} over {config.num_experts} experts gives experts of rank 1; the "
                "paper's have rank 16"
            )
        return get_peft_model(
            model,
            MoELoRAConfig(
                task_type=args.task_type.upper(),
                r=args.lora_rank,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                target_modules=get_target_modules(args, model),
                num_experts=config.num_experts,
                scaling=config.scaling,
                router_init=config.router_init,
            ),
        )

    @classmethod
    def as_lora(cls, tensors: "Mapping[str, Tensor]", config: Mapping[str, Any]) -> "dict[str, LoraPair]":
        """B' = B with the columns of each expert times its share, where the shares are the same for every input."""
        import torch

        rank, experts = config["r"], config["num_experts"]
        scale = config["lora_alpha"] / (rank if config["scaling"] == "total" else rank // experts)
        pairs = {}
        for name, a in tensors.items():
            layer, is_a, _ = name.partition(".moelora_A.")
            if not is_a:
                continue
            beta = 1.0 if config.get("beta") is None else config["beta"]
            if experts > 1 and beta > 0 and bool(tensors[f"{layer}.moelora_router.weight"].any()):
                raise UserError(
                    f"the router of {layer.removeprefix('base_model.model.')} chooses by the input, so no plain LoRA "
                    "computes the same: allowed are one expert, routers of zeros, and cl_moe with --cl_moe_beta 0"
                )
            gate = torch.full((experts,), beta / experts)
            if beta < 1:
                gate = gate + (1 - beta) * tensors[f"{layer}.moelora_task.weight"].float().softmax(dim=-1)
            shares = gate.repeat_interleave(rank // experts)
            pairs[layer] = LoraPair(a.float(), tensors[f"{layer}.moelora_B.weight"].float() * shares, scale)
        return pairs
