"""What a method sees of an engine: gradients of a step, full weights, a module for extra forwards."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from swift_cl.distributed.tensors import full_shape, full_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from swift_cl.lazy import LazyModule

    torch = LazyModule("torch")


class Engine(Protocol):
    """How one engine exposes gradients and weights."""

    def install(self, on_gradients: Callable[["GradientView"], None], after_step: Callable[[], None]) -> None:
        """Start to call `on_gradients` once per optimizer step before clipping and `after_step` after applied steps."""

    def after_backward(self) -> None:
        """Called by the trainer when a micro-batch's backward has returned."""

    def step_ended(self) -> None:
        """Called by the trainer when an optimizer step has ended."""

    def weights(self) -> "dict[str, Tensor]":
        """Full fp32 weights by name; may alias live ones."""

    def live_weights(self) -> "dict[str, Tensor]":
        """Full weights as a forward has them, in fp32; exchanged only where this process does not hold them whole."""

    def weight_parts(self) -> "dict[str, Tensor]":
        """What this process's optimizer steps on, fp32 by name: parts of the weights, or all of them."""

    def parts_of(self, full: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """Full tensors of parameters cut as `weight_parts` are, fp32."""

    @property
    def spread(self) -> bool:
        """Whether the processes' parts are different ones, and together all."""

    @property
    def module(self) -> Any:
        """The unwrapped module for extra forwards."""

    def gradients_of(self, total: "Tensor", names: Sequence[str]) -> "Sequence[Tensor | None]":
        """See `swift_cl.methods.base.TaskContext.gradients_of`."""

    def forward_with(self, held: "Mapping[str, Tensor]", inputs: Mapping[str, Any]) -> Any:
        """The module's outputs with other values of trained parameters, without gradient; every rank must call it.

        Args:
            held: by name, as `held` and `part_of` give them.
        """


def functional_forward(
    module: Any, parameters: "Mapping[str, nn.Parameter]", values: "Mapping[str, Tensor]", inputs: Mapping[str, Any]
) -> Any:
    """The outputs of a module that holds its parameters whole, with other values of some of them."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    own = {names[parameters[name]]: value for name, value in values.items()}
    with torch.no_grad():
        return torch.func.functional_call(module, own, (), dict(inputs))


def gradients_of(
    parameters: "Mapping[str, Tensor]", total: "Tensor", names: Sequence[str]
) -> "Sequence[Tensor | None]":
    """Gradients of a scalar that was computed with these parameters; None where it does not depend on one."""
    return torch.autograd.grad(total, [parameters[name] for name in names], allow_unused=True)


class GradientView:
    """Reduced, unscaled gradients of one optimizer step; see `swift_cl.methods.base.Gradients`."""

    def __init__(
        self,
        parameters: "Mapping[str, nn.Parameter]",
        read: "Callable[[nn.Parameter], Tensor]",
        write: "Callable[[nn.Parameter, Tensor], None]",
        add: "Callable[[nn.Parameter, Tensor], None]",
    ) -> None:
        self._parameters, self._read, self._write, self._add = parameters, read, write, add

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    def __getitem__(self, name: str) -> "Tensor":
        return self._read(self._parameters[name])

    def __setitem__(self, name: str, value: "Tensor") -> None:
        self._write(self._parameters[name], value)

    def add_part(self, name: str, part: "Tensor") -> None:
        self._add(self._parameters[name], part)

    def flat(self) -> "Tensor":
        return torch.cat([self[name].reshape(-1) for name in self._parameters])

    def set_flat(self, vector: "Tensor") -> None:
        offset = 0
        for name, parameter in self._parameters.items():
            count = full_size(parameter)
            self[name] = vector[offset : offset + count].view(full_shape(parameter))
            offset += count
