"""Configuration and model of the PEFT type MOELORA."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from swift_cl.tuners._peft_types import add_member
from swift_cl.tuners.moelora import PEFT_TYPE
from swift_cl.tuners.moelora.layer import BASE, PREFIX, MoELoRALayer

SCHEMA = 1
add_member(PEFT_TYPE)


@dataclass
class MoELoRAConfig(PeftConfig):
    """What `adapter_config.json` holds; checked here, so that a file that was edited is checked too.

    Attributes:
        r: rank of all experts together.
        num_experts: divides r.
        scaling: alpha / r ("total"), or alpha / (r / num_experts) ("expert").
        router_init: "default" or "zero".
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
    schema_version: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if self.schema_version != SCHEMA:
            raise ValueError(
                f"schema_version of a MoELoRA adapter is {self.schema_version}, this version reads {SCHEMA}"
            )
        if self.num_experts < 1 or self.r < 1 or self.r % self.num_experts != 0:
            raise ValueError(f"num_experts is {self.num_experts}, but it must divide r ({self.r})")
        for name, allowed in (("scaling", ("total", "expert")), ("router_init", ("default", "zero"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed: {', '.join(allowed)}")


class MoELoRAModel(BaseTuner):
    """Puts a `MoELoRALayer` around every target."""

    prefix = PREFIX
    tuner_layer_cls = MoELoRALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 -- PEFT's type

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, MoELoRALayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not (hasattr(target, "in_features") and hasattr(target, "out_features")):
            raise ValueError(f"{current_key} is {type(target).__name__}; moelora works on linear layers")
        layer = MoELoRALayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trained
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a call (one name a row, or one for all) to every layer."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names works in evaluation only, the model is in training mode")
        layers = [module for module in self.modules() if isinstance(module, MoELoRALayer)]
        known = {BASE}.union(*(layer.moelora_A.keys() for layer in layers))
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"adapters {', '.join(unknown)} are not loaded, there are: {', '.join(sorted(known))}")
        beams = kwargs.get("num_beams") or 1
        if len(names) > 1:
            names = [name for name in names for _ in range(beams)]
        handles = [layer.register_forward_pre_hook(partial(_with_names, names), with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _with_names(names: list[str], module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "adapter_names": names}
