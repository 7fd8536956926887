"""Full gradients and full weights under every engine: the only room that knows which engine runs; a file an engine."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swift_cl.distributed.engine import Engine, GradientView, functional_forward
from swift_cl.distributed.fsdp import FsdpEngine, agree_on_start, holds_weights, loaded_whole, start_fsdp
from swift_cl.distributed.plain import PlainEngine
from swift_cl.distributed.processes import all_reduce_sum, barrier, gather_json, launched_processes, node, world
from swift_cl.distributed.tensors import (
    copy_into,
    full_shape,
    full_tensor,
    gather_together,
    held,
    held_before,
    is_partitioned,
    part_of,
    plain_name,
    whole_under_zero3,
    write_trained,
)
from swift_cl.distributed.zero import DeepSpeedEngine, start_deepspeed
from swift_cl.errors import RunFailure

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "DeepSpeedEngine",
    "Engine",
    "FsdpEngine",
    "GradientView",
    "PlainEngine",
    "agree_on_start",
    "all_reduce_sum",
    "barrier",
    "copy_into",
    "full_shape",
    "full_state_dict",
    "full_tensor",
    "functional_forward",
    "gather_json",
    "gather_together",
    "held",
    "held_before",
    "holds_weights",
    "is_partitioned",
    "launched_processes",
    "loaded_whole",
    "make_engine",
    "node",
    "part_of",
    "plain_name",
    "start_deepspeed",
    "start_fsdp",
    "whole_under_zero3",
    "world",
    "write_trained",
]


def make_engine(trainer: Any, parameters: "Mapping[str, nn.Parameter]") -> Engine:
    """The engine that the trainer runs on."""
    if trainer.is_deepspeed_enabled:
        return DeepSpeedEngine(trainer, parameters)
    if getattr(trainer.accelerator, "is_fsdp2", False):
        return FsdpEngine(trainer, parameters)
    if trainer.args.fsdp:
        raise RunFailure(f"--fsdp: accelerate does not shard the model ({trainer.accelerator.distributed_type})")
    return PlainEngine(trainer, parameters)


def full_state_dict(trainer: Any) -> "dict[str, Tensor]":
    """Full weights of the trained model by live names; every rank must call it (ZeRO-3 gathers).

    Under ZeRO-3 frozen ones of a PEFT model may be missing; see `whole_under_zero3`.
    """
    state: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if state:
        # A weight that has two names is one tensor: accelerate copies each, and both would be saved.
        first: dict[int, str] = {}
        module = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        for live, parameter in module.named_parameters(remove_duplicate=False):
            name = plain_name(live)
            shared = first.setdefault(id(parameter), name)
            if shared != name and name in state and shared in state:
                state[name] = state[shared]
    return state
