"""moe_lora: one mixture of LoRA experts, continued over all tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from swift_cl.methods.base import Method, MethodConfig, Support


@dataclass
class MoELoRAConfig(MethodConfig):
    """`moe_lora` has no settings of its own; those of its tuner are `--moe_lora_*`."""


class MoELoRA(Method):
    """Sequential fine-tuning of the tuner `moelora`: it sets --tuner_type and changes nothing else."""

    name: ClassVar[str] = "moe_lora"
    title: ClassVar[str] = "Mixture of LoRA experts (MoELoRA)"
    summary: ClassVar[str] = "several LoRA experts with a router, tuned task after task (`--tuner_type moelora`)"
    cost: ClassVar[str] = "the experts"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.08350"
    config_class: ClassVar[type[MethodConfig]] = MoELoRAConfig
    support: ClassVar[Support] = Support(tuners=("moelora",), streaming=True)

    def required_flags(self) -> Mapping[str, str]:
        return {"tuner_type": "moelora"}
