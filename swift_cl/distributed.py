"""Full gradients and full weights under every engine: the only place that knows which engine runs.

none, DDP     p.grad is reduced when the last micro-batch's backward returns; it is unclipped then.
DeepSpeed     accelerate calls engine.step() inside backward, so gradients can be seen and changed only inside a
              wrapped engine.step, at an accumulation boundary, through deepspeed's safe_* functions.
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

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

    def forward_with(self, held: "Mapping[str, Tensor]", inputs: Mapping[str, Any]) -> Any:
        """The module's outputs with other values of trained parameters, without gradient; every rank must call it.

        Args:
            held: by name, as `held` and `part_of` give them.
        """

    @property
    def module(self) -> Any:
        """The unwrapped module for extra forwards."""


class GradientView:
    """Reduced, unscaled gradients of one optimizer step; see `swift_cl.methods.base.Gradients`."""

    def __init__(
        self,
        parameters: "Mapping[str, nn.Parameter]",
        read: "Callable[[nn.Parameter], Tensor]",
        write: "Callable[[nn.Parameter, Tensor], None]",
    ) -> None:
        self._parameters, self._read, self._write = parameters, read, write

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    def __getitem__(self, name: str) -> "Tensor":
        return self._read(self._parameters[name])

    def __setitem__(self, name: str, value: "Tensor") -> None:
        self._write(self._parameters[name], value)

    def flat(self) -> "Tensor":
        return torch.cat([self[name].reshape(-1) for name in self._parameters])

    def set_flat(self, vector: "Tensor") -> None:
        offset = 0
        for name, parameter in self._parameters.items():
            count = _full_size(parameter)
            self[name] = vector[offset : offset + count].view(full_shape(parameter))
            offset += count


def full_shape(parameter: "Tensor") -> "torch.Size":
    """The shape of the whole: a parameter that ZeRO-3 has partitioned is empty and keeps it in ds_shape."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def is_partitioned(tensor: "Tensor") -> bool:
    """Whether ZeRO-3 holds this tensor in parts, so that its values are not here."""
    return hasattr(tensor, "ds_shape")


def held(parameter: Any) -> "Tensor":
    """What this rank holds of a parameter: all of it, or under ZeRO-3 its part. May alias the live one."""
    value: Tensor = parameter.ds_tensor if is_partitioned(parameter) else parameter.detach()
    return value


def part_of(parameter: Any, value: "Tensor") -> "Tensor":
    """What this rank would hold of a parameter if that had another full value, in the parameter's dtype."""
    if not is_partitioned(parameter):
        return value.to(parameter.dtype)
    return _part(parameter, value).to(parameter.ds_tensor)


def _part(parameter: Any, value: "Tensor") -> "Tensor":
    """This rank's part of a full value; the last one's is filled up with zeros."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(parameter.ds_process_group)
    part = value.reshape(-1)[rank * size :][:size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


def functional_forward(
    module: Any, parameters: "Mapping[str, nn.Parameter]", values: "Mapping[str, Tensor]", inputs: Mapping[str, Any]
) -> Any:
    """The outputs of a module that holds its parameters whole, with other values of some of them."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    own = {names[parameters[name]]: value for name, value in values.items()}
    with torch.no_grad():
        return torch.func.functional_call(module, own, (), dict(inputs))


def gather_together(model: Any, classes: "set[type]") -> None:
    """Let ZeRO-3 gather all parameters within modules of these classes when such a module runs.

    Otherwise it gathers those of each module inside when that runs. To be called before the engine is made.
    """
    if any(map(is_partitioned, model.parameters())):
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list(classes))


def write_trained(parameter: "nn.Parameter", value: "Tensor") -> None:
    """Write a full value into a trained parameter, its fp32 master included; every rank must call it."""
    if is_partitioned(parameter):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, _part(parameter, value.float()))
    elif hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value.float())
    copy_into(parameter, value)


def copy_into(parameter: "Tensor", value: "Tensor") -> None:
    """Write a full value into a parameter that has no optimizer (it is not trained, or there is none yet), in its own
    dtype; every rank must call it.

    Only for those: an optimizer's fp32 master of a trained one would stay what it was (`write_trained`).
    """
    with torch.no_grad():
        if not is_partitioned(parameter):
            parameter.copy_(value)
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if world()[0] == 0:
                parameter.copy_(value)


def _full_size(parameter: "nn.Parameter") -> int:
    return full_shape(parameter).numel()


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
            if parameter.grad is None:
                return torch.zeros_like(parameter, dtype=torch.float32)
            gradient = parameter.grad.detach().float()
            return gradient if scale == 1.0 else gradient / scale

        def write(parameter: "nn.Parameter", value: "Tensor") -> None:
            value = value if scale == 1.0 else value * scale
            if parameter.grad is None:
                parameter.grad = value.to(parameter.dtype).clone()
            elif parameter.grad is not value:
                parameter.grad.copy_(value)

        view = GradientView(self._parameters, read, write)
        if scale != 1.0 and not all(bool(torch.isfinite(view[name]).all()) for name in view.names):
            return  # fp16 overflow: the scaler skips this step, and a projection of infinities would be noise
        self._on_gradients(view)

    def step_ended(self) -> None:
        if self._after_step is not None and not self._trainer.accelerator.optimizer_step_was_skipped:
            self._after_step()

    def weights(self) -> "dict[str, Tensor]":
        return {name: parameter.detach().float() for name, parameter in self._parameters.items()}

    def forward_with(self, held: "Mapping[str, Tensor]", inputs: Mapping[str, Any]) -> Any:
        return functional_forward(self.module, self._parameters, held, inputs)


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
            safe_set_local_grad(parameter, _part(parameter, value))
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


def make_engine(trainer: Any, parameters: "Mapping[str, nn.Parameter]") -> Engine:
    """The engine that the trainer runs on."""
    engine = DeepSpeedEngine if trainer.is_deepspeed_enabled else PlainEngine
    return engine(trainer, parameters)


def world() -> tuple[int, int]:
    """(rank, world size) of the process group, (0, 1) where there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def launched_processes() -> int:
    """Number of processes that the launcher started; known before the process group is."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_deepspeed(args: Any) -> None:
    """Start DeepSpeed's communication where accelerate starts only torch's: on the CPU.

    ZeRO-1 and ZeRO-3 read the number of processes from it, ZeRO-3 already when the model is made.
    """
    if args.deepspeed and launched_processes() > 1 and not torch.cuda.is_available():
        import deepspeed

        deepspeed.init_distributed(dist_backend=args.ddp_backend or "gloo")


def barrier() -> None:
    """Wait for all ranks."""
    if world()[1] > 1:
        torch.distributed.barrier()


def all_reduce_sum(tensor: "Tensor") -> "Tensor":
    """Sum over ranks, in place; the same tensor where there is one process."""
    if world()[1] > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def full_state_dict(trainer: Any) -> "dict[str, Tensor]":
    """Full weights of the trained model by live names; every rank must call it (ZeRO-3 gathers).

    Under ZeRO-3 frozen ones of a PEFT model may be missing; see `whole_of_partitioned`.
    """
    state: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state


def whole_of_partitioned(parameters: "Mapping[str, nn.Parameter]") -> "dict[str, Tensor]":
    """Full values, on the CPU, of those that ZeRO-3 holds in parts; every rank must call it."""
    partitioned = {name: parameter for name, parameter in parameters.items() if is_partitioned(parameter)}
    if not partitioned:
        return {}
    from deepspeed.runtime.zero import GatheredParameters

    whole = {}
    for name, parameter in partitioned.items():
        with GatheredParameters([parameter]):
            whole[name] = parameter.detach().to("cpu", copy=True)
    return whole
