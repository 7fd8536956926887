"""The process group."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from swift_cl.lazy import LazyModule

    torch = LazyModule("torch")


def world() -> tuple[int, int]:
    """(rank, world size) of the process group, (0, 1) where there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def launched_processes() -> int:
    """Number of processes that the launcher started; known before the process group is."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def node() -> tuple[int, int]:
    """(this machine's rank, number of machines) as torchrun's variables say; what only one machine may do, 0 does."""
    return int(os.environ.get("NODE_RANK", "0")), int(os.environ.get("NNODES", "1").partition(":")[0])


def barrier() -> None:
    """Wait for all ranks."""
    if world()[1] > 1:
        torch.distributed.barrier()


def all_reduce_sum(tensor: "Tensor") -> "Tensor":
    """Sum over ranks, in place; the same tensor where there is one process."""
    if world()[1] > 1:
        torch.distributed.all_reduce(tensor)
    return tensor
