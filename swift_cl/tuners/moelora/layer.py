"""The layer: one stacked A and B, whose rows are weighted by the gate of their expert.

Row i k .. (i + 1) k of A and the same columns of B are expert i, k = r / E. So the sum over experts of g_i B_i A_i x is
B (rep(g, k) o (A x)): two matrix products whatever the number of experts.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

PREFIX = "moelora_"
BASE = "__base__"
"""PEFT's name for "no adapter" among `adapter_names`."""


class MoELoRALayer(nn.Module, BaseTunerLayer):
    """Wraps one linear layer; its weight is not touched, so it may be quantised."""

    adapter_layer_names = ("moelora_A", "moelora_B", "moelora_router")
    other_param_names = ("scaling", "num_experts", "moelora_dropout")
    base_layer: Any
    moelora_A: Any
    moelora_B: Any
    moelora_router: Any
    moelora_dropout: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.moelora_A = nn.ModuleDict()
        self.moelora_B = nn.ModuleDict()
        self.moelora_router = nn.ModuleDict()
        self.moelora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.num_experts: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter: A ~ N(0, 0.01^2), B = 0, so that it changes nothing at first."""
        peft: Any = self  # PEFT's half of the class, which has no types
        base = peft.get_base_layer()
        inputs, outputs = base.in_features, base.out_features
        a, b = nn.Linear(inputs, config.r, bias=False), nn.Linear(config.r, outputs, bias=False)
        router = nn.Linear(inputs, config.num_experts, bias=False)
        nn.init.normal_(a.weight, std=0.01)
        nn.init.zeros_(b.weight)
        if config.router_init == "zero":
            nn.init.zeros_(router.weight)
        self.moelora_A[adapter_name], self.moelora_B[adapter_name], self.moelora_router[adapter_name] = a, b, router
        self.moelora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        rank = config.r if config.scaling == "total" else config.r // config.num_experts
        self.scaling[adapter_name] = config.lora_alpha / rank
        self.num_experts[adapter_name] = config.num_experts
        peft._move_adapter_to_device_of_base_layer(adapter_name)
        peft.set_adapter(peft.active_adapters, inference_mode=config.inference_mode)

    def gate(self, x: Tensor, adapter_name: str) -> Tensor:
        """[..., E]: the experts' shares for each token, fp32, sum 1.

        Args:
            x: [..., in], in the dtype of the adapter.
        """
        shares: Tensor = self.moelora_router[adapter_name](x).float().softmax(dim=-1)
        return shares

    def delta(self, x: Tensor, adapter_name: str) -> Tensor:
        """What one adapter adds to the output, [..., out]."""
        a = self.moelora_A[adapter_name]
        peft: Any = self
        x = peft._cast_input_dtype(x, a.weight.dtype)
        hidden = a(self.moelora_dropout[adapter_name](x))
        experts = hidden.unflatten(-1, (self.num_experts[adapter_name], -1))
        mixed = experts * self.gate(x, adapter_name).to(hidden.dtype).unsqueeze(-1)
        added: Tensor = self.moelora_B[adapter_name](mixed.flatten(-2)) * self.scaling[adapter_name]
        return added

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        peft: Any = self
        result: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        if peft.disable_adapters:
            return result
        if adapter_names is None:
            for name in peft.active_adapters:
                if name in self.moelora_A:
                    result = result + self.delta(x, name)
            return result.to(dtype)
        if len(adapter_names) == 1:  # as ms-swift's engine passes it for a batch of any size
            adapter_names = adapter_names * len(x)
        for name in sorted(set(adapter_names) - {BASE}):
            rows = torch.tensor([row for row, wanted in enumerate(adapter_names) if wanted == name], device=x.device)
            if name in self.moelora_A:
                result = result.index_add(0, rows, self.delta(x[rows], name).to(dtype))
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: what the adapter adds depends on the input."""
        raise ValueError("a MoELoRA adapter cannot be merged: what it adds depends on the input")

    def unmerge(self) -> None:
        """Refused, as `merge`."""
        raise ValueError("a MoELoRA adapter is never merged")
