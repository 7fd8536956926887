"""The conditional VAE of pcll: pooled hidden states -> prior and posterior -> a vector added to embeddings.

Imports torch: methods import this module when they run, not at their top.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swift_cl.methods._adapters import AdapterSwitch
from swift_cl.methods._hidden_states import HiddenStates
from swift_cl.methods.base import TaskContext


@dataclass(frozen=True)
class Latent:
    """Of some rows.

    Attributes:
        added: M z, z ~ posterior, [rows, width].
        kl: KL(posterior || prior), summed over the code, [rows].
    """

    added: Tensor
    kl: Tensor


class Heads(nn.Module):
    """Pooling vector, heads of prior and posterior, and M.

    Args:
        width: of the model.
        size: of the code z.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.pooling = nn.Parameter(0.02 * torch.randn(width))
        self.prior_mean, self.prior_logvar = nn.Linear(width, size), nn.Linear(width, size)
        self.post_mean, self.post_logvar = nn.Linear(width, size), nn.Linear(width, size)
        self.to_embedding = nn.Linear(size, width, bias=False)

    def prior(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance) from the hidden states of a task's prompt, [rows, size] each."""
        pooled = pool(states, mask, self.pooling)
        return through(self.prior_mean, pooled), through(self.prior_logvar, pooled)

    def forward(self, states: Tensor, prompt: Tensor, mask: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a code for each row; the parts of a `Latent`, which an engine finds tensors in.

        Args:
            states: hidden states of prompt and text, [rows, length, width].
            prompt, mask: which positions are the prompt's, and which are real at all, [rows, length].
            noise: standard normal, [rows, size].
        """
        prior_mean, prior_logvar = self.prior(states, prompt)
        pooled = pool(states, mask, self.pooling)
        mean, logvar = through(self.post_mean, pooled), through(self.post_logvar, pooled)
        code = mean + torch.exp(0.5 * logvar) * noise
        return through(self.to_embedding, code), divergence(mean, logvar, prior_mean, prior_logvar)


def through(layer: nn.Linear, rows: Tensor) -> Tensor:
    """A layer's output in fp32, also where an engine keeps its weights in another dtype."""
    return layer(rows.to(layer.weight.dtype)).float()  # type: ignore[no-any-return]


def pool(states: Tensor, mask: Tensor, vector: Tensor) -> Tensor:
    """sum over the real tokens of softmax(gelu(h . v)) h, [rows, width]."""
    states = states.float()
    scores = nn.functional.gelu(states @ vector.float()).masked_fill(~mask.bool(), -torch.inf)
    return (torch.softmax(scores, dim=-1).unsqueeze(-1) * states).sum(dim=1)


def divergence(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    """KL of two diagonal Gaussians, summed over the last dimension."""
    spread = ((mean - prior_mean).square() + logvar.exp()) / prior_logvar.exp()
    return 0.5 * (prior_logvar - logvar + spread - 1).sum(dim=-1)


def beta(step: int, steps: int, cycles: int, ratio: float) -> float:
    """Weight of the divergence: in every cycle linear from 0 to 1 over its first part, then 1."""
    place = (step * cycles % steps) / steps
    return min(1.0, place / ratio)


def last_states(ctx: TaskContext, inputs: dict[str, Any], base: bool) -> Tensor:
    """Hidden states after the last layer, without dropout and gradient, [rows, length, width].

    Args:
        base: of the base model, its adapters off.
    """
    kept = HiddenStates(ctx.model, [-1])
    given = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    switch = AdapterSwitch(ctx.model)
    try:
        with torch.no_grad(), ctx.statistics_mode():
            if base:
                with switch.active():
                    ctx.module_for_forward(**given, logits_to_keep=1)
            else:
                ctx.module_for_forward(**given, logits_to_keep=1)
    finally:
        states = kept.take()
        kept.remove()
    found: Tensor = states[0]
    return found


def real(inputs: dict[str, Any]) -> Tensor:
    """Which positions hold tokens, [rows, length]."""
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"])
    return mask.bool()


def before_answer(inputs: dict[str, Any]) -> Tensor:
    """Real positions before the first label, [rows, length]."""
    answered: Tensor = (inputs["labels"] != -100).long().cumsum(dim=1) > 0
    return real(inputs) & ~answered


def noise(seeds: Sequence[int], size: int) -> Tensor:
    """Standard normal numbers, one row a seed, [rows, size]: the same whatever batch a row is in."""
    return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
