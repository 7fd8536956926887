"""FSDP2: parameters are DTensors of which a process holds a part; gradients too, reduced after the last micro-batch.

Clipping and the optimizer come after that, so gradients are seen at the same moment as without an engine.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from swift_cl.distributed.engine import gradients_of
from swift_cl.distributed.plain import PlainEngine
from swift_cl.distributed.processes import world
from swift_cl.distributed.tensors import full_tensor, held, is_sharded, part_of
from swift_cl.errors import RunFailure

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from swift_cl.lazy import LazyModule

    torch = LazyModule("torch")

USED = "ACCELERATE_USE_FSDP"
EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""Environment variables that ms-swift sets; with the first, transformers and it load models differently, with both only
a machine's first process loads weights, which accelerate then spreads."""


class FsdpEngine(PlainEngine):
    """FSDP2 (`--fsdp fsdp2`): reading is collective, writing is not."""

    def __init__(self, trainer: Any, parameters: "Mapping[str, nn.Parameter]") -> None:
        super().__init__(trainer, parameters)
        names = {parameter: name for name, parameter in parameters.items()}
        self._places = {live: names[p] for live, p in self.module.named_parameters() if p in names}
        self._gathered: dict[str, Tensor] = {}
        self._keep_random_state()

    def _keep_random_state(self) -> None:
        """Let checkpointed layers be recomputed with the dropout masks that their forward had.

        accelerate (1.15) wraps them with preserve_rng_state=False, so that gradients would be those of other masks.
        """
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

        for module in self.module.modules():
            if isinstance(module, CheckpointWrapper):
                module.checkpoint_fn = functools.partial(module.checkpoint_fn, preserve_rng_state=True)

    def _gradient(self, parameter: "nn.Parameter") -> "Tensor":
        if parameter.grad is None:
            sharded: Any = parameter
            return torch.zeros(sharded.shape, dtype=torch.float32, device=sharded.device_mesh.device_type)
        return full_tensor(parameter.grad.detach()).float()

    def _set_gradient(self, parameter: "nn.Parameter", value: "Tensor") -> None:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        held(parameter.grad).copy_(part_of(parameter, value))

    def step_ended(self) -> None:
        # A forward without a backward leaves some layers whole, with the weights that they had then.
        self._reshard()
        super().step_ended()

    def _groups(self) -> "Iterator[tuple[str, Any]]":
        """(name, module) of all that FSDP2 shards and gathers as one."""
        from torch.distributed.fsdp import FSDPModule

        return ((name, module) for name, module in self.module.named_modules() if isinstance(module, FSDPModule))

    def _reshard(self) -> None:
        for _, module in self._groups():
            module.reshard()

    def gradients_of(self, total: "Tensor", names: "Sequence[str]") -> "Sequence[Tensor | None]":
        # The graph holds the gathered parameters, not the sharded ones.
        if not self._gathered:
            self._gathered = self._find_gathered()
        return gradients_of(self._gathered, total, names)

    def _find_gathered(self) -> "dict[str, Tensor]":
        """The parameters that a forward computes with, by name; they stay the same objects for all of training."""
        found = {}
        for _, group in self._groups():
            group.unshard()
            for live, parameter in self.module.named_parameters():
                if live in self._places and not is_sharded(parameter):
                    found[self._places[live]] = parameter
            group.reshard()
        if missing := self._parameters.keys() - found.keys():
            raise RunFailure(f"FSDP2 does not gather what is trained: {sorted(missing)[:5]}")
        return found

    def forward_with(self, held: "Mapping[str, Tensor]", inputs: "Mapping[str, Any]") -> Any:
        # In place, because FSDP2 puts its own parameters into the module for every forward.
        parameters: dict[str, Any] = {name: self._parameters[name].detach() for name in held}
        live = {name: parameter.to_local() for name, parameter in parameters.items()}
        before = {name: part.clone() for name, part in live.items()}
        try:
            self._exchange(live, held)
            with torch.no_grad():
                return self.module(**inputs)
        finally:
            self._exchange(live, before)

    def _exchange(self, live: "Mapping[str, Tensor]", parts: "Mapping[str, Tensor]") -> None:
        for name, part in parts.items():
            live[name].copy_(part)
        self._reshard()

    def weights(self) -> "dict[str, Tensor]":
        self._reshard()  # what is looked for in the module then is what `ctx.parameters` has
        return {name: full_tensor(parameter.detach()).float() for name, parameter in self._parameters.items()}


def start_fsdp(args: Any, has_buffers: bool, recomputes: bool) -> None:
    """Settle what ms-swift and accelerate leave open before the model is loaded.

    Args:
        has_buffers: whether the tuner's weights have buffers among them.
        recomputes: whether layers may be run again in the backward; FSDP2 does that by a setting of its own.
    """
    training = args.training_args
    if not args.fsdp:
        return
    if not recomputes:
        training.fsdp_plugin_args["activation_checkpointing"] = False
    if has_buffers:
        from accelerate.utils.fsdp_utils import disable_fsdp_ram_efficient_loading

        # accelerate spreads a model that the first process alone has loaded, but of a buffer it wants a DTensor's mesh.
        disable_fsdp_ram_efficient_loading()
        training.fsdp_plugin_args["cpu_ram_efficient_loading"] = False
    if args.is_adapter:
        # A resumed run of ms-swift loads an adapter from its checkpoint, which a sharded one does not have.
        training.fsdp_plugin_args["state_dict_type"] = "FULL_STATE_DICT"
    if training.device.type == "cpu":
        _fsdp_on_cpu(training)


def _fsdp_on_cpu(training: Any) -> None:
    """Make FSDP2 what accelerate prepares models for: by itself it trains CPU processes by DDP, and does not say so.

    It keeps the kind of training in a state that all its objects share and that the next stage's arguments reset; the
    Trainer's own `Accelerator` finds it there.
    """
    from accelerate import Accelerator, DistributedType, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(**training.fsdp_plugin_args)
    state = Accelerator(cpu=True, mixed_precision=training.mixed_precision, fsdp_plugin=plugin).state
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


@contextlib.contextmanager
def loaded_whole() -> "Iterator[None]":
    """Load models as without FSDP2 while the block runs: with all their weights, on the device of training."""
    before = os.environ.pop(USED, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[USED] = before


def holds_weights() -> bool:
    """Whether this process has loaded a model's weights: for FSDP2 a machine's first one alone may have."""
    return not (_is_set(USED) and _is_set(EFFICIENT)) or os.environ.get("LOCAL_RANK", "0") == "0"


def agree_on_start(model: Any, device: Any) -> None:
    """Give every process the first one's start of what is trained, before the model is sharded.

    Where each process has loaded the model itself, FSDP2 cuts a process's part out of what that one has; ms-swift seeds
    them differently, so of a matrix drawn at random each would have a part of another one.
    """
    if not _is_set(USED) or _is_set(EFFICIENT) or world()[1] == 1:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            value = parameter.detach().to(device)
            torch.distributed.broadcast(value, src=0)
            parameter.data.copy_(value)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
