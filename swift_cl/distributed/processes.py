"""The process group."""

import json
import os
from typing import TYPE_CHECKING, Any

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


def gather_json(value: Any) -> list[Any]:
    """Every rank's JSON value, by rank, on every rank; every rank must call it."""
    if world()[1] == 1:
        return [value]
    # NCCL moves what lies on a GPU only.
    on_gpu = torch.cuda.is_available() and "gloo" not in torch.distributed.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world()[1])]
    torch.distributed.all_gather(sizes, torch.tensor([len(own)], device=device))
    longest = max(int(size) for size in sizes)
    texts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in sizes]
    torch.distributed.all_gather(texts, torch.nn.functional.pad(own, (0, longest - len(own))))
    return [json.loads(bytes(text[: int(size)].cpu().numpy())) for text, size in zip(texts, sizes, strict=True)]
