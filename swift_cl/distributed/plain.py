"""No engine, or DDP: `p.grad` is reduced when the last micro-batch's backward returns; it is unclipped then."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swift_cl.distributed.engine import GradientView, functional_forward, gradients_of
from swift_cl.distributed.tensors import fp32_part_of, held, is_partitioned

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from swift_cl.lazy import LazyModule

    torch = LazyModule("torch")


class PlainEngine:
    """One process, or DDP."""

    def __init__(self, trainer: Any, parameters: "Mapping[str, nn.Parameter]") -> None:
        self._trainer, self._parameters = trainer, parameters
        self._on_gradients: Callable[[GradientView], None] | None = None
        self._after_step: Callable[[], None] | None = None

    @property
    def module(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model_wrapped)

    def install(self, on_gradients: Callable[[GradientView], None], after_step: Callable[[], None]) -> None:
        self._on_gradients, self._after_step = on_gradients, after_step

    def _loss_scale(self) -> float:
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0

    def after_backward(self) -> None:
        if self._on_gradients is None or not self._trainer.accelerator.sync_gradients:
            return
        scale = self._loss_scale()

        def read(parameter: "nn.Parameter") -> "Tensor":
            gradient = self._gradient(parameter)
            return gradient if scale == 1.0 else gradient / scale

        def write(parameter: "nn.Parameter", value: "Tensor") -> None:
            self._set_gradient(parameter, value if scale == 1.0 else value * scale)

        def add(parameter: "nn.Parameter", part: "Tensor") -> None:
            self._add_to_gradient(parameter, part if scale == 1.0 else part * scale)

        view = GradientView(self._parameters, read, write, add)
        if scale != 1.0 and not all(bool(torch.isfinite(view[name]).all()) for name in view.names):
            return  # fp16 overflow: the scaler skips this step, and a projection of infinities would be noise
        self._on_gradients(view)

    def _gradient(self, parameter: "nn.Parameter") -> "Tensor":
        """The full gradient in fp32."""
        if parameter.grad is None:
            return torch.zeros_like(parameter, dtype=torch.float32)
        return parameter.grad.detach().float()

    def _set_gradient(self, parameter: "nn.Parameter", value: "Tensor") -> None:
        if parameter.grad is None:
            parameter.grad = value.to(parameter.dtype).clone()
        elif parameter.grad is not value:
            parameter.grad.copy_(value)

    def _add_to_gradient(self, parameter: "nn.Parameter", part: "Tensor") -> None:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        held(parameter.grad).add_(part)

    def step_ended(self) -> None:
        if self._after_step is not None and not self._trainer.accelerator.optimizer_step_was_skipped:
            self._after_step()

    def weights(self) -> "dict[str, Tensor]":
        return {name: parameter.detach().float() for name, parameter in self._parameters.items()}

    def gradients_of(self, total: "Tensor", names: Sequence[str]) -> "Sequence[Tensor | None]":
        return gradients_of(self._parameters, total, names)

    def forward_with(self, held: "Mapping[str, Tensor]", inputs: Mapping[str, Any]) -> Any:
        return functional_forward(self.module, self._parameters, held, inputs)

    def live_weights(self) -> "dict[str, Tensor]":
        return self.weights()

    def weight_parts(self) -> "dict[str, Tensor]":
        return {name: held(parameter).float() for name, parameter in self._parameters.items()}

    def parts_of(self, full: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        return {name: fp32_part_of(self._parameters[name], value) for name, value in full.items()}

    @property
    def spread(self) -> bool:
        return any(map(is_partitioned, self._parameters.values()))
