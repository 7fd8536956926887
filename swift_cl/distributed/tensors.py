"""Tensors of which a process may hold a part only."""

from typing import TYPE_CHECKING

from swift_cl.distributed.processes import world

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from swift_cl.lazy import LazyModule

    torch = LazyModule("torch")


def full_shape(parameter: "nn.Parameter") -> "torch.Size":
    # A parameter that ZeRO-3 has partitioned is empty and keeps its real shape in ds_shape.
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def full_size(parameter: "nn.Parameter") -> int:
    return full_shape(parameter).numel()


def is_partitioned(tensor: "Tensor") -> bool:
    """Whether ZeRO-3 holds this tensor in parts, so that its values are not here."""
    return hasattr(tensor, "ds_shape")


def copy_into(parameter: "nn.Parameter", value: "Tensor") -> None:
    """Write a full value into a parameter that is not trained, in its own dtype; every rank must call it.

    Only for those: an optimizer's fp32 master of a trained one would stay what it was.
    """
    with torch.no_grad():
        if not is_partitioned(parameter):
            parameter.copy_(value)
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if world()[0] == 0:
                parameter.copy_(value)
