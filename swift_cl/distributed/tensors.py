"""Tensors of which a process may hold a part only."""

from typing import TYPE_CHECKING

from swift_cl.distributed.processes import world

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from swift_cl.lazy import LazyModule

    torch = LazyModule("torch")


def plain_name(name: str) -> str:
    """A parameter's name without what engines put around modules (the last one is FSDP2's checkpointing)."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def full_shape(parameter: "nn.Parameter") -> "torch.Size":
    # A parameter that ZeRO-3 has partitioned is empty and keeps its real shape in ds_shape.
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def full_size(parameter: "nn.Parameter") -> int:
    return full_shape(parameter).numel()


def is_sharded(tensor: "Tensor") -> bool:
    """Whether FSDP2 (or another part of torch) holds this tensor in parts."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full_tensor(tensor: "Tensor") -> "Tensor":
    """The whole of a sharded tensor, the tensor itself where it is whole; every rank must call it."""
    if not is_sharded(tensor):
        return tensor
    # What FSDP2 offloads lies on the CPU, where NCCL gathers nothing.
    whole: Tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return whole


def local(tensor: "Tensor") -> "Tensor":
    """This process's part, which writing into changes the tensor; the tensor itself where it is whole."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def part_of(like: "Tensor", value: "Tensor") -> "Tensor":
    """A full value cut as `like` is, in its dtype and on its device; no communication, so equal on all ranks only where
    the value is."""
    if not is_sharded(like):
        return value.to(like.device, like.dtype)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    cut = distribute_tensor(value.detach().to(mesh.device_type, like.dtype), mesh, placements, src_data_rank=None)
    return cut.to(like.device)


def is_partitioned(tensor: "Tensor") -> bool:
    """Whether this tensor is held in parts, by ZeRO-3 or FSDP2, so that its values are not here."""
    return hasattr(tensor, "ds_shape") or is_sharded(tensor)


def copy_into(parameter: "nn.Parameter", value: "Tensor") -> None:
    """Write a full value into a parameter that is not trained, in its own dtype; every rank must call it.

    Only for those: an optimizer's fp32 master of a trained one would stay what it was.
    """
    with torch.no_grad():
        if not is_partitioned(parameter):
            parameter.copy_(value)
            return
        if is_sharded(parameter):
            parameter.copy_(part_of(parameter, value))
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if world()[0] == 0:
                parameter.copy_(value)
