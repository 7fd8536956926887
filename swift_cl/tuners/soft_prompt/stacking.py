"""Prompts of one task after another: a finished one is computed and frozen, and a new one put in front of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from swift_cl.io import sha256_tensors
from swift_cl.stages import WEIGHTS
from swift_cl.tuners.base import TRAINED
from swift_cl.tuners.soft_prompt.layer import Prompt
from swift_cl.tuners.soft_prompt.model import SoftPromptConfig, layer_of, prompt_of

OWN, EARLIER = "embedding", "earlier"


def put_in_front(model: Any, seed: int) -> None:
    """Freeze the computed prompt of the model as the newest earlier one, and begin a new one of the same shape."""
    config, old = config_of(model), prompt_of(model)
    finished = old.embedding.detach().to("cpu", torch.float32)
    kept = finished if old.exact is None else torch.cat([finished, old.exact])
    config.earlier, config.baked = len(kept), False
    new = _drawn(config, seed)
    new.earlier, new.exact = kept.to(old.embedding.device), kept
    layer_of(model).soft_prompt_of[TRAINED] = new.to(old.embedding.device)


def _drawn(config: SoftPromptConfig, seed: int) -> Prompt:
    """A prompt whose MLP begins with the values of a seed; the run's own random numbers stay where they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Prompt(config)


def config_of(model: Any) -> SoftPromptConfig:
    """The configuration of the trained prompt."""
    config: SoftPromptConfig = model.peft_config[TRAINED]
    return config


def computed(config: SoftPromptConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors of a prompt, by live name, as the one tensor P' that is kept of them.

    On a copy: the live ones may lie on several ranks.
    """
    copy = _drawn(config, 0).float().eval()
    by_name = {name.rpartition(".")[2]: name for name in tensors}
    with torch.no_grad():
        for short, parameter in copy.named_parameters():
            parameter.copy_(tensors[by_name[short]])
        own = copy.own().contiguous()
    return {by_name[OWN]: own}


def stored_rows(folder: Path) -> Tensor:
    """All rows of a computed prompt's file, the newest task's first, fp32."""
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    return torch.cat([tensors[name].float() for name in (OWN, EARLIER) if name in tensors])


def rows_sha256(rows: Tensor) -> str:
    """Hash of prompt rows."""
    return sha256_tensors({"rows": rows.contiguous()})
