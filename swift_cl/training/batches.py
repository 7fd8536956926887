"""Batches in a given order: what a method asks for (`Method.batch_order`), or that of a training that is resumed."""

from collections.abc import Callable, Iterator, Sequence

from swift_cl.errors import UserError


class OrderedBatchSampler:
    """Cuts one permutation an epoch into micro-batches, the same permutation on every rank.

    Rank r takes every W-th row, so the W x accumulation micro-batches of an optimizer step are consecutive rows.

    Args:
        order: epoch -> permutation of range(n_rows).
        n_rows: number of rows; the last n_rows mod W are left out, as in ms-swift's own sampler.
        batch_size: rows of one micro-batch.
        used: rows of an epoch instead of n_rows - n_rows mod W: those of the training that is resumed. The last step
            of an epoch is dealt out evenly where W does not divide them.
        accumulation: micro-batches of a rank in an optimizer step; only with `used`.

    Raises:
        UserError: a rank would have nothing to do in the last step of an epoch.
    """

    def __init__(
        self,
        order: Callable[[int], Sequence[int]],
        n_rows: int,
        batch_size: int,
        rank: int,
        world_size: int,
        used: int | None = None,
        accumulation: int = 1,
    ) -> None:
        self._order, self._batch_size, self._rank, self._world_size = order, batch_size, rank, world_size
        self._used = n_rows - n_rows % world_size if used is None else used
        uneven = self._used % world_size != 0
        self._last = self._used % (world_size * batch_size * accumulation) if uneven else 0
        self._last_batches = -(-self._last // (world_size * batch_size))
        if self._last // world_size < self._last_batches:
            raise UserError(
                f"an epoch of {self._used} rows ends in a step of {self._last}, which {world_size} processes cannot "
                "share; resume with a number that divides the rows, or start the stage anew with --cl_resume false"
            )
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the coming epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-((self._used - self._last) // self._world_size) // self._batch_size) + self._last_batches

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self._order(self._epoch))[: self._used]
        whole = self._used - self._last
        own = order[:whole][self._rank :: self._world_size]
        for start in range(0, len(own), self._batch_size):
            yield own[start : start + self._batch_size]
        last = order[whole:][self._rank :: self._world_size]
        for number in range(self._last_batches):
            yield last[number * len(last) // self._last_batches : (number + 1) * len(last) // self._last_batches]


def shuffled(n_rows: int, seed: int, epoch: int) -> list[int]:
    """The permutation that ms-swift's own sampler makes of `n_rows` rows in an epoch."""
    import torch

    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
