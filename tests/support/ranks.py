"""Several ranks in one process: a thread each, with a real sum at every all-reduce."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from tests.support.fake_context import FakeContext

T = TypeVar("T")
# A rank that leaves out a collective would hang for ever with a real process group; here the test fails.
_PATIENCE = 20.0


class _Group:
    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=_PATIENCE)
        self._parts: list[Any] = [None] * size

    def reducer(self, rank: int) -> Callable[[Tensor], Tensor]:
        def all_reduce_sum(tensor: Tensor) -> Tensor:
            self._parts[rank] = tensor.clone()
            self._barrier.wait()
            tensor.copy_(torch.stack(self._parts).sum(0))
            self._barrier.wait()
            return tensor

        return all_reduce_sum

    def abort(self) -> None:
        self._barrier.abort()


def on_ranks(size: int, make: Callable[[int, int], FakeContext], work: Callable[[FakeContext], T]) -> list[T]:
    """`work(make(rank, size))` on every rank; their results by rank."""
    group = _Group(size)

    def one(rank: int) -> T:
        ctx = make(rank, size)
        ctx.all_reduce_sum = group.reducer(rank)  # type: ignore[method-assign]
        try:
            return work(ctx)
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(size)]]
