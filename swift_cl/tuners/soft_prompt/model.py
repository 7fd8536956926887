"""Configuration and model of the PEFT type SOFT_PROMPT."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import Tensor

from swift_cl.errors import UserError
from swift_cl.tuners.base import TRAINED
from swift_cl.tuners.injected import InjectedModel, checked
from swift_cl.tuners.peft_types import add_member
from swift_cl.tuners.soft_prompt import PEFT_TYPE
from swift_cl.tuners.soft_prompt.layer import Prompt, SoftPromptLayer

PREFIX = "soft_prompt_"
SCHEMA = 1
add_member(PEFT_TYPE)


@dataclass
class SoftPromptConfig(PeftConfig):
    """What `adapter_config.json` holds.

    Attributes:
        length, mlp, bottleneck, layer_norm: of the own prompt.
        hidden_size: of the model.
        earlier: number of rows that earlier tasks left.
        baked: whether the own prompt is computed already, its MLP gone.
        tasks: whose prompts these are, in the order of learning, where a method stacks them.
    """

    length: int = 10
    mlp: str = "none"
    bottleneck: int = 800
    layer_norm: bool = True
    hidden_size: int = 0
    earlier: int = 0
    baked: bool = False
    tasks: list[str] = field(default_factory=list)
    target_modules: Any = None
    exclude_modules: Any = None
    schema_version: int = SCHEMA

    def __post_init__(self) -> None:
        super().__post_init__()
        checked(self, PEFT_TYPE, SCHEMA)
        if self.length < 1 or self.hidden_size < 1 or self.earlier < 0:
            raise ValueError(
                f"length is {self.length}, hidden_size {self.hidden_size} and earlier {self.earlier}, allowed: two "
                "numbers >= 1 and one >= 0"
            )
        if self.mlp not in ("none", "mlp1", "mlp2"):
            raise ValueError(f"mlp is {self.mlp!r}, allowed: none, mlp1, mlp2")


class SoftPromptModel(InjectedModel):
    """Puts a `SoftPromptLayer` around the backbone."""

    prefix = PREFIX
    tuner_layer_cls = SoftPromptLayer


def new_config(model: Any, settings: Any) -> SoftPromptConfig:
    """The configuration of a new prompt for a model.

    Raises:
        UserError: the model has no backbone that reads embeddings and gives hidden states.
    """
    name = model.base_model_prefix
    if not name or not hasattr(model, name) or model.config.is_encoder_decoder:
        raise UserError(
            f"--tuner_type soft_prompt: {type(model).__name__} is no language model with one backbone, in front of "
            "whose input embeddings could be put"
        )
    return SoftPromptConfig(
        task_type="CAUSAL_LM",
        length=settings.length,
        mlp=settings.mlp,
        bottleneck=settings.bottleneck,
        layer_norm=settings.layer_norm,
        hidden_size=model.config.get_text_config().hidden_size,
        target_modules=re.escape(name),
    )


def layer_of(model: Any) -> SoftPromptLayer:
    """The layer around the backbone."""
    return next(module for module in model.modules() if isinstance(module, SoftPromptLayer))


def prompt_of(model: Any) -> Prompt:
    """The trained prompt."""
    prompt: Prompt = layer_of(model).soft_prompt_of[TRAINED]
    return prompt


def remember_earlier(model: Any) -> None:
    """Keep the earlier prompts as they were loaded."""
    for prompt in layer_of(model).soft_prompt_of.values():
        prompt.exact = None if prompt.earlier is None else prompt.earlier.detach().to("cpu", copy=True)


def with_exact_earlier(model: Any, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A state to be saved whose earlier prompts are those that were loaded, bit for bit."""
    found = dict(model.state_dict() if state is None else state)
    exact = prompt_of(model).exact
    if exact is not None:
        name = next(key for key in found if key.endswith(f"soft_prompt_of.{TRAINED}.earlier"))
        found[name] = exact
    return found
