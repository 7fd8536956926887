"""The layer: one stacked A and B, whose rows are weighted by the gate of their expert.

Row i k .. (i + 1) k of A and the same columns of B are expert i, k = r / E. So the sum over experts of g_i B_i A_i x is
B (rep(g, k) o (A x)): two matrix products whatever the number of experts.

With a task gate (of the method cl_moe) g = beta softmax(R x) + (1 - beta) softmax(s), s being E numbers of the layer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from swift_cl.tuners.injected import AddingLayer

PREFIX = "moelora_"


class TaskGate(nn.Module):
    """The experts' shares for one task, alike at first."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts))

    def forward(self) -> Tensor:
        """[E], fp32, sum 1."""
        shares: Tensor = self.weight.float().softmax(dim=-1)
        return shares


class MoELoRALayer(AddingLayer):
    """Wraps one linear layer."""

    adapter_layer_names = ("moelora_A", "moelora_B", "moelora_router", "moelora_task")
    other_param_names = ("scaling", "num_experts", "beta", "moelora_dropout")
    moelora_A: Any
    moelora_B: Any
    moelora_router: Any
    moelora_task: Any

    def prepare(self) -> None:
        self.moelora_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.num_experts: dict[str, int] = {}
        self.beta: dict[str, float] = {}

    def new_parts(self, config: Any) -> dict[str, nn.Module]:
        """A ~ N(0, 0.01^2), B = 0, so that the adapter changes nothing at first."""
        inputs, outputs = self.base_layer.in_features, self.base_layer.out_features
        a, b = nn.Linear(inputs, config.r, bias=False), nn.Linear(config.r, outputs, bias=False)
        router = nn.Linear(inputs, config.num_experts, bias=False)
        nn.init.normal_(a.weight, std=0.01)
        nn.init.zeros_(b.weight)
        if config.router_init == "zero":
            nn.init.zeros_(router.weight)
        parts: dict[str, nn.Module] = {"moelora_A": a, "moelora_B": b, "moelora_router": router}
        return parts if config.beta is None else {**parts, "moelora_task": TaskGate(config.num_experts)}

    def set_up(self, adapter_name: str, config: Any) -> None:
        self.moelora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        rank = config.r if config.scaling == "total" else config.r // config.num_experts
        self.scaling[adapter_name] = config.lora_alpha / rank
        self.num_experts[adapter_name] = config.num_experts
        if config.beta is not None:
            self.beta[adapter_name] = config.beta

    def new_task(self, adapter_name: str, beta: float) -> None:
        """A task gate that knows nothing yet, in place of an earlier task's if there is one."""
        weight = self.moelora_A[adapter_name].weight
        gate = TaskGate(self.num_experts[adapter_name])
        self.moelora_task[adapter_name] = gate.to(weight.device, weight.dtype)
        self.beta[adapter_name] = beta

    def gate(self, x: Tensor, adapter_name: str) -> Tensor:
        """[..., E]: the experts' shares for each token, fp32, sum 1.

        Args:
            x: [..., in], in the dtype of the adapter.
        """
        shares: Tensor = self.moelora_router[adapter_name](x).float().softmax(dim=-1)
        if adapter_name not in self.moelora_task:
            return shares
        beta = self.beta[adapter_name]
        mixed: Tensor = beta * shares + (1 - beta) * self.moelora_task[adapter_name]()
        return mixed

    def added(self, x: Tensor, result: Tensor, adapter_name: str) -> Tensor:
        a = self.moelora_A[adapter_name]
        x = x.to(a.weight.dtype)
        hidden = a(self.moelora_dropout[adapter_name](x))
        experts = hidden.unflatten(-1, (self.num_experts[adapter_name], -1))
        mixed = experts * self.gate(x, adapter_name).to(hidden.dtype).unsqueeze(-1)
        added: Tensor = self.moelora_B[adapter_name](mixed.flatten(-2)) * self.scaling[adapter_name]
        return added
