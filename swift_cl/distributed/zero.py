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
        view = GradientView(self._parameters, self._read, self._write)

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


def start_deepspeed(args: Any) -> None:
    """Start DeepSpeed's communication where accelerate starts only torch's: on the CPU.

    ZeRO-1 and ZeRO-3 read the number of processes from it, ZeRO-3 already when the model is made.
    """
    if args.deepspeed and launched_processes() > 1 and not torch.cuda.is_available():
        import deepspeed

        deepspeed.init_distributed(dist_backend=args.ddp_backend or "gloo")
