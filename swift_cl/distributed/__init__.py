"""Full gradients and full weights under every engine: the only room that knows which engine runs; a file an engine."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swift_cl.distributed.engine import Engine, GradientView
from swift_cl.distributed.plain import PlainEngine
from swift_cl.distributed.processes import all_reduce_sum, barrier, gather_json, launched_processes, world
from swift_cl.distributed.tensors import copy_into, is_partitioned
from swift_cl.distributed.zero import DeepSpeedEngine, start_deepspeed

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "DeepSpeedEngine",
    "Engine",
    "GradientView",
    "PlainEngine",
    "all_reduce_sum",
    "barrier",
    "copy_into",
    "full_state_dict",
    "gather_json",
    "is_partitioned",
    "launched_processes",
    "make_engine",
    "start_deepspeed",
    "world",
]


def make_engine(trainer: Any, parameters: "Mapping[str, nn.Parameter]") -> Engine:
    """The engine that the trainer runs on."""
    engine = DeepSpeedEngine if trainer.is_deepspeed_enabled else PlainEngine
    return engine(trainer, parameters)


def full_state_dict(trainer: Any) -> "dict[str, Tensor]":
    """Full weights of the trained model by live names; every rank must call it (ZeRO-3 gathers)."""
    state: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state
