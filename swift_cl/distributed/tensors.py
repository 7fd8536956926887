"""Tensors of which a process may hold a part only: ZeRO-3 keeps the real shape in `ds_shape`, FSDP2 has DTensors."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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


def full_shape(parameter: "Tensor") -> "torch.Size":
    """The shape of the whole: a parameter that ZeRO-3 has partitioned is empty, a DTensor has it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def full_size(parameter: "Tensor") -> int:
    """The number of elements of the whole."""
    return full_shape(parameter).numel()


def is_sharded(tensor: "Tensor") -> bool:
    """Whether FSDP2 holds this tensor in parts."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_partitioned(tensor: "Tensor") -> bool:
    """Whether this tensor is held in parts, by ZeRO-3 or FSDP2, so that its values are not all here."""
    return hasattr(tensor, "ds_shape") or is_sharded(tensor)


def full_tensor(tensor: Any) -> "Tensor":
    """The whole of what FSDP2 shards, any other tensor itself; every rank must call it."""
    if not is_sharded(tensor):
        whole: Tensor = tensor
        return whole
    # What FSDP2 offloads lies on the CPU, where NCCL gathers nothing.
    whole = tensor.to(tensor.device_mesh.device_type).full_tensor()
    return whole


def held(parameter: Any) -> "Tensor":
    """What this rank holds of a parameter: all of it, or its part. May alias the live one."""
    if is_sharded(parameter):
        value: Tensor = parameter.detach().to_local()
        return value
    value = parameter.ds_tensor if is_partitioned(parameter) else parameter.detach()
    return value


def part_of(parameter: Any, value: "Tensor") -> "Tensor":
    """What this rank would hold of a parameter if that had another full value, in the parameter's dtype."""
    if is_sharded(parameter):
        return _cut(parameter, value, None)
    if not is_partitioned(parameter):
        return value.to(parameter.dtype)
    return zero_part(parameter, value).to(parameter.ds_tensor)


def zero_part(parameter: Any, value: "Tensor") -> "Tensor":
    """This rank's part of a full value as ZeRO-3 cuts it, in the value's dtype; the last one's is filled up with 0."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(parameter.ds_process_group)
    part = value.reshape(-1)[rank * size :][:size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


def held_before(parameter: Any, value: "Tensor") -> "Tensor":
    """What was `held` of a parameter before there was an engine, as it is held now; every rank must call it.

    FSDP2 shards only then, and from what the first rank holds: the others may have loaded nothing.
    """
    if is_sharded(parameter) and value.shape == parameter.shape:
        return _cut(parameter, value, 0)
    return value.to(held(parameter))


def fp32_part_of(parameter: Any, value: "Tensor") -> "Tensor":
    """As `part_of` where ZeRO-3 is not at work, in fp32 whatever the parameter's dtype is."""
    return _cut(parameter, value, None, torch.float32) if is_sharded(parameter) else value.float()


def _cut(parameter: Any, value: "Tensor", source: int | None, dtype: "torch.dtype | None" = None) -> "Tensor":
    """This rank's part of a full value: of the one that rank `source` has, or, without communication, of its own."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    whole = value.detach().to(mesh.device_type, dtype or parameter.dtype)
    part: Tensor = distribute_tensor(whole, mesh, placements, src_data_rank=source).to_local()
    return part.to(parameter.device)


def write_trained(parameter: "nn.Parameter", value: "Tensor") -> None:
    """Write a full value into a trained parameter, its fp32 master included; every rank must call it."""
    if hasattr(parameter, "ds_shape"):
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, zero_part(parameter, value.float()))
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
        if is_sharded(parameter):
            held(parameter).copy_(part_of(parameter, value))
            return
        if not is_partitioned(parameter):
            parameter.copy_(value)
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if world()[0] == 0:
                parameter.copy_(value)


def gather_together(model: Any, classes: "set[type]") -> None:
    """Let ZeRO-3 gather all parameters within modules of these classes when such a module runs.

    Otherwise it gathers those of each module inside when that runs. To be called before the engine is made.
    """
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list(classes))


def whole_under_zero3(parameters: "Mapping[str, nn.Parameter]") -> "dict[str, Tensor]":
    """Full values, on the CPU, of those that ZeRO-3 holds in parts; every rank must call it."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_shape"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                found[name] = parameter.detach().to("cpu", copy=True)
    return found
