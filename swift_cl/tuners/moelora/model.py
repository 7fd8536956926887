"""Configuration and model of the PEFT type MOELORA."""

from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from torch import nn

from swift_cl.tuners.injected import InjectedModel, checked
from swift_cl.tuners.moelora import PEFT_TYPE
from swift_cl.tuners.moelora.layer import PREFIX, MoELoRALayer
from swift_cl.tuners.peft_types import add_member

SCHEMA, WITH_TASK_GATE = 1, 2
"""A version that knows no task gates refuses the second."""
add_member(PEFT_TYPE)


@dataclass
class MoELoRAConfig(PeftConfig):
    """What `adapter_config.json` holds; checked here, so that a file that was edited is checked too.

    Attributes:
        r: rank of all experts together.
        num_experts: divides r.
        scaling: alpha / r ("total"), or alpha / (r / num_experts) ("expert").
        router_init: "default" or "zero".
        beta: share of the router's gate beside that of a task; None for the router's alone.
        schema_version: of the layout of the tensors.
    """

    r: int = 8
    num_experts: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    scaling: str = "total"
    router_init: str = "default"
    target_modules: Any = None
    exclude_modules: Any = None
    beta: float | None = None
    schema_version: int = SCHEMA

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self, PEFT_TYPE, SCHEMA if self.beta is None else WITH_TASK_GATE)
        if self.num_experts < 1 or self.r < 1 or self.r % self.num_experts != 0:
            raise ValueError(f"num_experts is {self.num_experts}, but it must divide r ({self.r})")
        if self.beta is not None and not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}, allowed: a number in [0, 1]")
        for name, allowed in (("scaling", ("total", "expert")), ("router_init", ("default", "zero"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed: {', '.join(allowed)}")


class MoELoRAModel(InjectedModel):
    """Puts a `MoELoRALayer` around every target."""

    prefix = PREFIX
    tuner_layer_cls = MoELoRALayer

    def check_target(self, target: nn.Module, name: str) -> None:
        if not (hasattr(target, "in_features") and hasattr(target, "out_features")):
            raise ValueError(f"{name} is {type(target).__name__}; moelora works on linear layers")

    def new_task(self, adapter_name: str, beta: float) -> None:
        """Give every layer of an adapter a new task gate, whose share is 1 - beta."""
        for module in self.modules():
            if isinstance(module, MoELoRALayer):
                module.new_task(adapter_name, beta)
        config: Any = self.peft_config[adapter_name]
        config.beta, config.schema_version = beta, WITH_TASK_GATE
