"""Batches in the order that a method asks for (`Method.batch_order`)."""

from collections.abc import Callable, Iterator, Sequence


class OrderedBatchSampler:
    """Cuts one permutation an epoch into micro-batches, the same permutation on every rank.

    Rank r takes every W-th row, so the W x accumulation micro-batches of an optimizer step are consecutive rows.

    Args:
        order: epoch -> permutation of range(n_rows).
        n_rows: number of rows; the last n_rows mod W are left out, as in ms-swift's own sampler.
        batch_size: rows of one micro-batch.
    """

    def __init__(
        self, order: Callable[[int], Sequence[int]], n_rows: int, batch_size: int, rank: int, world_size: int
    ) -> None:
        self._order, self._batch_size, self._rank, self._world_size = order, batch_size, rank, world_size
        self._per_rank = n_rows // world_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the coming epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._per_rank // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self._order(self._epoch))[: self._per_rank * self._world_size]
        own = order[self._rank :: self._world_size]
        for start in range(0, len(own), self._batch_size):
            yield own[start : start + self._batch_size]
