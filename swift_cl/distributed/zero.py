"""DeepSpeed: accelerate calls engine.step() inside backward, so gradients can be seen and changed only inside a wrapped
engine.step, at an accumulation boundary, through deepspeed's safe_* functions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swift_cl.distributed.engine import GradientView, functional_forward, gradients_of
from swift_cl.distributed.processes import launched_processes
from swift_cl.distributed.tensors import full_shape, is_partitioned, zero_part

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from swift_cl.lazy import LazyModule

    torch = LazyModule("torch")


class DeepSpeedEngine:
    """ZeRO stages 0 to 3, through deepspeed's safe_* functions inside a wrapped engine.step."""

    def __init__(self, trainer: Any, parameters: "Mapping[str, nn.Parameter]") -> None:
        self._trainer, self._parameters = trainer, parameters

    @property
    def _engine(self) -> Any:
        return self._trainer.model_wrapped

    @property
    def module(self) -> Any:
        return self._engine.module

    def install(self, on_gradients: Callable[[GradientView], None], after_step: Callable[[], None]) -> None:
        engine, original = self._engine, self._engine.step
        view = GradientView(self._parameters, self._read, self._write, self._add)

        def step(*args: Any, **kwargs: Any) -> Any:
            boundary = engine.is_gradient_accumulation_boundary()
            if boundary and not self._overflowed(view):
                on_gradients(view)
            result = original(*args, **kwargs)
            if boundary and engine.was_step_applied():
                after_step()
            return result

        engine.step = step

    def _overflowed(self, view: GradientView) -> bool:
        if not self._engine.fp16_enabled():
            return False
        return not all(bool(torch.isfinite(view[name]).all()) for name in view.names)

    def _scale(self) -> float:
        return float(self._engine.optimizer.cur_scale) if self._engine.fp16_enabled() else 1.0

    def _read(self, parameter: "nn.Parameter") -> "Tensor":
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter)
        if gradient is None:
            return torch.zeros(full_shape(parameter), dtype=torch.float32, device=parameter.device)
        unscaled: Tensor = gradient.detach().float() / self._scale()
        return unscaled

    def _write(self, parameter: Any, value: "Tensor") -> None:
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        value = value * self._scale()
        if is_partitioned(parameter):
            # Its part, not the whole: DeepSpeed would not look whether the last rank's is shorter.
            safe_set_local_grad(parameter, zero_part(parameter, value))
            return
        safe_set_full_grad(parameter, value)
        self._renew_norm(parameter)

    def _add(self, parameter: Any, part: "Tensor") -> None:
        part = part * self._scale()
        if is_partitioned(parameter):
            from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

            safe_set_local_grad(parameter, safe_get_local_grad(parameter) + part)
            return
        fragment = _fragment(parameter)
        # As DeepSpeed chooses: what it accumulates in fp32, else the parameter's gradient, else its part of that.
        if parameter.grad is not None and getattr(parameter, "_hp_grad", None) is None:
            own = parameter.grad.view(-1)
        else:
            assert fragment is not None
            own = fragment.get_lp_grad_fragment(parameter._index_in_param_group).data.view(-1)
        if own.numel() != part.numel():
            address = fragment.lp_fragment_address
            own = own.narrow(0, address.start, address.numel)
        own.add_(part.reshape(-1))
        if hasattr(parameter, "_zero_optimizer"):
            parameter._zero_optimizer.update_offload_overflow_tracker(part)
        self._renew_norm(parameter)

    def _renew_norm(self, parameter: Any) -> None:
        norms = getattr(self._engine.optimizer, "norm_for_param_grads", None)
        mapping = getattr(parameter, "_hp_mapping", None)
        if norms and mapping is not None:
            # With an offloaded optimizer ZeRO-2 clips by norms that it took before the gradient was changed.
            own = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
            norms[self._engine.optimizer.get_param_id(parameter)] = own.norm()

    def after_backward(self) -> None:
        """Nothing: the wrapped engine.step has done it."""

    def step_ended(self) -> None:
        """Nothing: the wrapped engine.step has done it."""

    def weights(self) -> "dict[str, Tensor]":
        from deepspeed.utils import safe_get_full_fp32_param

        full = {}
        for name, parameter in self._parameters.items():
            master = safe_get_full_fp32_param(parameter)
            # ZeRO-0 keeps no fp32 master; the live parameter is then complete.
            full[name] = (parameter if master is None else master).detach().float()
        return full

    def live_weights(self) -> "dict[str, Tensor]":
        if any(map(is_partitioned, self._parameters.values())):
            return self.weights()
        return {name: parameter.detach().float() for name, parameter in self._parameters.items()}

    def weight_parts(self) -> "dict[str, Tensor]":
        found = {}
        for name, parameter in self._parameters.items():
            if is_partitioned(parameter):
                from deepspeed.utils import safe_get_local_fp32_param

                found[name] = safe_get_local_fp32_param(parameter).detach().float()
            elif not _is_cut(parameter):
                found[name] = parameter.detach().float()
            elif (fragment := _fragment(parameter)) is not None:
                found[name] = fragment.get_hp_fragment().detach().float()
        return found

    def parts_of(self, full: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        found = {}
        for name, value in full.items():
            parameter: Any = self._parameters[name]
            if is_partitioned(parameter):
                found[name] = zero_part(parameter, value.float())
            elif not _is_cut(parameter):
                found[name] = value.float()
            elif (fragment := _fragment(parameter)) is not None:
                address = fragment.lp_fragment_address
                found[name] = value.float().reshape(-1).narrow(0, address.start, address.numel)
        return found

    @property
    def spread(self) -> bool:
        return any(is_partitioned(parameter) or _is_cut(parameter) for parameter in self._parameters.values())

    def gradients_of(self, total: "Tensor", names: Sequence[str]) -> "Sequence[Tensor | None]":
        return gradients_of(self._parameters, total, names)

    def forward_with(self, held: "Mapping[str, Tensor]", inputs: Mapping[str, Any]) -> Any:
        parameters: dict[str, Any] = {name: self._parameters[name] for name in held}
        if not any(map(is_partitioned, parameters.values())):
            return functional_forward(self.module, parameters, held, inputs)
        # ZeRO-3 gathers a layer from the parts, when it runs: these are exchanged, so no rank ever holds all.
        before = {name: parameter.ds_tensor.data for name, parameter in parameters.items()}
        try:
            self._exchange(parameters, held)
            with torch.no_grad():
                return self.module(**inputs)
        finally:
            self._exchange(parameters, before)

    def _exchange(self, parameters: Mapping[str, Any], parts: "Mapping[str, Tensor]") -> None:
        self._engine.optimizer.empty_partition_cache()  # lets go of layers that were gathered from the old parts
        for name, part in parts.items():
            parameters[name].ds_tensor.data = part


def _is_cut(parameter: Any) -> bool:
    """Whether ZeRO-1 or 2 lets every process step on a part of it, or of others alone."""
    return hasattr(parameter, "_hp_mapping")


def _fragment(parameter: Any) -> Any:
    """DeepSpeed's description of this process's part; None where it has none."""
    return getattr(parameter, "_hp_mapping", None)


def start_deepspeed(args: Any) -> None:
    """Start DeepSpeed's communication where accelerate starts only torch's: on the CPU.

    ZeRO-1 and ZeRO-3 read the number of processes from it, ZeRO-3 already when the model is made.
    """
    if args.deepspeed and launched_processes() > 1 and not torch.cuda.is_available():
        import deepspeed

        deepspeed.init_distributed(dist_backend=args.ddp_backend or "gloo")
