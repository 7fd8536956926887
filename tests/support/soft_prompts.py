"""The small language model with a soft prompt in front of its input."""

from typing import Any

import torch
from torch import Tensor

from swift_cl.tuners.registry import get_tuner
from tests.support.tiny_lora import language_model

WIDTH = 16


def sharp_model() -> Any:
    """The small model with larger weights: what stands where, and how far apart, changes what it says."""
    model = language_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


def config(**changes: Any) -> Any:
    """An adapter's configuration for the small model."""
    get_tuner("soft_prompt").register()
    from swift_cl.tuners.soft_prompt.model import SoftPromptConfig

    settings = {"length": 3, "mlp": "none", "hidden_size": WIDTH, "target_modules": "model", "bottleneck": 4}
    return SoftPromptConfig(task_type="CAUSAL_LM", **{**settings, **changes})


def prompted(seed: int = 1, std: float = 0.5, **changes: Any) -> Any:
    """The model with a prompt far from zero, in eval mode."""
    from peft import get_peft_model

    from swift_cl.tuners.soft_prompt.model import prompt_of

    model = get_peft_model(sharp_model(), config(**changes))
    torch.manual_seed(seed)
    prompt = prompt_of(model)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.normal_(std=std)
        if prompt.earlier is not None:
            prompt.earlier.normal_(std=std)
    return model.eval()


def rows_of(model: Any) -> Tensor:
    """What the model reads in front of the input."""
    from swift_cl.tuners.soft_prompt.model import prompt_of

    with torch.no_grad():
        found: Tensor = prompt_of(model)()
    return found
