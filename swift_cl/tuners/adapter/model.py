"""Layer, configuration and model of the PEFT type HOULSBY."""

from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn
from transformers.activations import ACT2FN

from swift_cl.tuners.adapter import PEFT_TYPE
from swift_cl.tuners.injected import AddingLayer, InjectedModel, checked
from swift_cl.tuners.peft_types import add_member

PREFIX = "houlsby_"
SCHEMA = 1
add_member(PEFT_TYPE)


@dataclass
class HoulsbyConfig(PeftConfig):
    """What `adapter_config.json` holds.

    Attributes:
        length: width of the bottleneck.
        act: name of the activation, one of transformers' ACT2FN.
        init: "zero" or "xavier".
        hidden_size: of the model.
    """

    length: int = 128
    act: str = "gelu"
    init: str = "zero"
    hidden_size: int = 0
    target_modules: Any = None
    exclude_modules: Any = None
    schema_version: int = SCHEMA

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self, PEFT_TYPE, SCHEMA)
        if self.length < 1 or self.hidden_size < 1:
            raise ValueError(f"length is {self.length} and hidden_size {self.hidden_size}, both must be >= 1")
        if self.init not in ("zero", "xavier"):
            raise ValueError(f"init is {self.init!r}, allowed: zero, xavier")


class HoulsbyLayer(AddingLayer):
    """Wraps one MLP."""

    adapter_layer_names = ("houlsby_down", "houlsby_up")
    other_param_names = ("houlsby_act",)
    houlsby_down: Any
    houlsby_up: Any

    def prepare(self) -> None:
        self.houlsby_act: dict[str, Any] = {}

    def new_parts(self, config: Any) -> dict[str, nn.Module]:
        """D Xavier, U = 0 (or Xavier), biases 0."""
        down, up = nn.Linear(config.hidden_size, config.length), nn.Linear(config.length, config.hidden_size)
        for part in (down, up):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        if config.init == "zero":
            nn.init.zeros_(up.weight)
        return {"houlsby_down": down, "houlsby_up": up}

    def set_up(self, adapter_name: str, config: Any) -> None:
        self.houlsby_act[adapter_name] = ACT2FN[config.act]

    def added(self, x: Tensor, result: Tensor, adapter_name: str) -> Tensor:
        down = self.houlsby_down[adapter_name]
        hidden = self.houlsby_act[adapter_name](down(result.to(down.weight.dtype)))
        added: Tensor = self.houlsby_up[adapter_name](hidden)
        return added


class HoulsbyModel(InjectedModel):
    """Puts a `HoulsbyLayer` around the MLP of every layer."""

    prefix = PREFIX
    tuner_layer_cls = HoulsbyLayer
