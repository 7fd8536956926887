"""The trained prompt, and the layer around a model's backbone that puts it into every batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swift_cl.tuners.injected import BASE, InjectedLayer
from swift_cl.tuners.soft_prompt.placing import Placed, positions

FIRST, SECOND, LAST, NORM = "first", "second", "last", "norm"
AFTER: dict[str, Callable[[Tensor], Tensor]] = {FIRST: torch.relu, SECOND: torch.tanh, LAST: lambda hidden: hidden}
"""What follows each linear map of the MLP."""


def mlp_parts(config: Any, width: int) -> dict[str, nn.Module]:
    """f, part by part; empty where the prompt is trained itself, or was computed when its task ended."""
    if config.mlp == "none" or config.baked:
        return {}
    hidden = config.bottleneck
    parts: dict[str, nn.Module] = {FIRST: nn.Linear(width, hidden)}
    if config.mlp == "mlp2":
        parts[SECOND] = nn.Linear(hidden, hidden // 2)
        hidden //= 2
    parts[LAST] = nn.Linear(hidden, width)
    if config.layer_norm:
        parts[NORM] = nn.LayerNorm(width)
    return parts


class Prompt(nn.Module):
    """P' = P + f(P), [n, width], and after it the prompts of earlier tasks, the newest first.

    Attributes:
        earlier: [m, width], None for none. A buffer, because nothing may ever train it.
        exact: the same as it was read from its file: an engine may cast buffers to its own precision.
    """

    earlier: Tensor | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.embedding = nn.Parameter(torch.zeros(config.length, width))
        parts = mlp_parts(config, width)
        self.parts = list(parts)
        for name, part in parts.items():
            # Flat names: PEFT takes an adapter's name out of the last two parts of a tensor's name only.
            for kind, parameter in part.named_parameters():
                self.register_parameter(f"{name}_{kind}", parameter)
        self.register_buffer("earlier", torch.zeros(config.earlier, width) if config.earlier else None)
        self.exact: Tensor | None = None

    def own(self) -> Tensor:
        """P', fp32 outside of autocast."""
        hidden: Tensor = self.embedding
        for name in self.parts:
            weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
            if name == NORM:
                hidden = functional.layer_norm(hidden, hidden.shape[-1:], weight, bias)
            else:
                hidden = AFTER[name](functional.linear(hidden, weight, bias))
        return self.embedding + hidden if self.parts else hidden

    def forward(self) -> Tensor:
        """All rows, [n + m, width]."""
        own = self.own()
        return own if self.earlier is None else torch.cat([own, self.earlier.to(own.dtype)])


class SoftPromptLayer(InjectedLayer):
    """Wraps the backbone: what comes out has the positions of what came in, so nothing around it sees prompts."""

    adapter_layer_names = ("soft_prompt_of",)
    soft_prompt_of: Any

    def __getattr__(self, name: str) -> Any:
        """What the model around looks for on its backbone (`embed_tokens`, `layers`, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def new_parts(self, config: Any) -> dict[str, nn.Module]:
        return {"soft_prompt_of": Prompt(config)}

    def _prompt(self, adapter_names: list[str] | None) -> Tensor | None:
        """The rows to put in; None for the base model."""
        peft: Any = self
        if peft.disable_adapters:
            return None
        wanted = set(peft.active_adapters if adapter_names is None else adapter_names) - {BASE}
        if adapter_names is not None and len(set(adapter_names)) > 1:
            raise ValueError("a batch has one soft prompt for all its rows")
        found = sorted(filter(self.has, wanted))
        if len(found) > 1:
            raise ValueError(f"one soft prompt is active at a time, not {', '.join(found)}")
        prompt: Tensor | None = self.soft_prompt_of[found[0]]() if found else None
        return prompt

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        *,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {"past_key_values": past_key_values, **kwargs}
        prompt = self._prompt(adapter_names)
        if prompt is None:
            return self.base_layer(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **given,
            )
        if inputs_embeds is None:
            inputs_embeds = self.base_layer.get_input_embeddings()(input_ids)
        tokens = inputs_embeds.shape[1]
        place = Placed.behind(attention_mask, len(prompt))
        if attention_mask is not None:
            attention_mask = place.put_in(attention_mask.new_ones(len(prompt)), attention_mask)
        # A cache that is filled holds the prompts already.
        first = past_key_values is None or past_key_values.get_seq_length() == 0
        if first:
            inputs_embeds = place.put_in(prompt.to(inputs_embeds.dtype), inputs_embeds)
            tokens += len(prompt)
        # Given position ids do not count the prompts; without padding the backbone counts by itself.
        position_ids = None if attention_mask is None else positions(attention_mask)[:, -tokens:]
        outputs = self.base_layer(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **given
        )
        if first:
            outputs.last_hidden_state = place.take_out(outputs.last_hidden_state)
            if outputs.get("hidden_states") is not None:
                outputs.hidden_states = tuple(map(place.take_out, outputs.hidden_states))
        return outputs
