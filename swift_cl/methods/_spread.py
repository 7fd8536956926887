"""Vectors of all trained parameters, whole on every rank, or of every tensor a part on each rank. Imports torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from swift_cl.methods._projection import gram
from swift_cl.methods.base import TaskContext


class Layout:
    """Where the numbers of a set of tensors lie.

    Args:
        shapes: of the whole tensors by name, the same and in the same order on every rank.
        spread: whether each rank keeps a part only. Then whatever several ranks must agree on is summed up over them,
            and no rank holds more than one tensor that is whole.
    """

    def __init__(self, ctx: TaskContext, shapes: Mapping[str, torch.Size], spread: bool) -> None:
        self._ctx, self._shapes, self._spread = ctx, dict(shapes), spread and ctx.world_size > 1

    def _span(self, count: int) -> tuple[int, int]:
        """First and last + 1 number that this rank keeps of a tensor."""
        if not self._spread:
            return 0, count
        size = -(-count // self._ctx.world_size)
        return min(self._ctx.rank * size, count), min((self._ctx.rank + 1) * size, count)

    def _own(self, tensor: Tensor) -> Tensor:
        start, end = self._span(tensor.numel())
        return tensor.reshape(-1)[start:end].float()

    def own(self, tensors: Iterable[Tensor]) -> Tensor:
        """This rank's vector of whole tensors, which may come one at a time; fp32, a copy."""
        return torch.cat([self._own(tensor) for tensor in tensors])

    def summed(self, tensors: Sequence[Tensor]) -> Tensor:
        """The same of their sums over the ranks; every rank must call it."""
        if not self._spread:
            return self._ctx.all_reduce_sum(self.own(tensors))
        return self.own(self._ctx.all_reduce_sum(tensor) for tensor in tensors)

    def products(self, vectors: Sequence[Tensor]) -> Tensor:
        """Dot products of the whole vectors, fp64, the same on every rank to the last bit; every rank must call it."""
        found = gram(vectors)
        # Where all hold all, rank 0's decide, so that replicas cannot part over a last bit.
        return self._ctx.all_reduce_sum(found if self._spread or self._ctx.rank == 0 else torch.zeros_like(found))

    def whole(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) one after the other; every rank must go through all."""
        offset = 0
        for name, shape in self._shapes.items():
            start, end = self._span(shape.numel())
            own = vector[offset : offset + end - start]
            offset += end - start
            if self._spread:
                tensor = vector.new_zeros(shape.numel())
                tensor[start:end] = own
                own = self._ctx.all_reduce_sum(tensor)
            yield name, own.view(shape)
