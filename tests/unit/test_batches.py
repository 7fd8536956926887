"""Batches follow the permutation, on one rank or on several, and every row is seen once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swift_cl.errors import UserError
from swift_cl.methods.base import Method
from swift_cl.training.batches import OrderedBatchSampler, shuffled
from swift_cl.training.portable import Layout, Resumed


def sampler(n_rows: int, batch: int, rank: int = 0, world: int = 1) -> OrderedBatchSampler:
    """Epoch e's order is 0..n-1 rotated by e."""
    return OrderedBatchSampler(lambda epoch: [(i + epoch) % n_rows for i in range(n_rows)], n_rows, batch, rank, world)


def test_one_rank() -> None:
    batches = sampler(7, 3)
    assert list(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(batches) == 3


def test_set_epoch_changes_the_order() -> None:
    batches = sampler(4, 2)
    batches.set_epoch(1)
    assert list(batches) == [[1, 2], [3, 0]]


@pytest.mark.parametrize(("n_rows", "batch", "world"), [(8, 2, 2), (9, 2, 2), (11, 4, 3), (3, 5, 2), (5, 1, 4)])
def test_ranks_share_the_rows(n_rows: int, batch: int, world: int) -> None:
    parts = [list(sampler(n_rows, batch, rank, world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1, "a rank with fewer batches would leave the others waiting"
    assert len(parts[0]) == len(sampler(n_rows, batch, 0, world))
    seen = [row for part in parts for rows in part for row in rows]
    assert sorted(seen) == list(range(n_rows - n_rows % world))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_optimizer_step_sees_the_same_rows_however_it_is_split(world: int) -> None:
    """8 rows a step: 1 x 8, 2 x 4, 4 x 2 (ranks x batch), or batch 1 with accumulation."""
    for batch in (8 // world, 1):
        parts = [list(sampler(16, batch, rank, world)) for rank in range(world)]
        per_step = 8 // (world * batch)
        for step in range(2):
            rows = [r for part in parts for b in part[step * per_step : (step + 1) * per_step] for r in b]
            assert sorted(rows) == list(range(8 * step, 8 * step + 8))


def test_nothing_for_a_rank() -> None:
    assert list(sampler(1, 2, 0, 2)) == []
    assert len(sampler(1, 2, 0, 2)) == 0


@pytest.mark.parametrize(
    ("used", "batch", "accumulation", "world"),
    [(13, 2, 2, 2), (11, 2, 1, 2), (45, 4, 1, 2), (44, 2, 2, 3), (17, 3, 1, 2), (15, 2, 2, 3)],
)
def test_rows_of_another_number_of_processes(used: int, batch: int, accumulation: int, world: int) -> None:
    """A resumed training keeps its rows and steps: every rank has as many batches, none is empty, none too large."""
    parts = [
        list(OrderedBatchSampler(lambda _: range(used), used, batch, rank, world, used, accumulation))
        for rank in range(world)
    ]
    (length,) = {len(part) for part in parts}
    assert all(1 <= len(rows) <= batch for part in parts for rows in part)
    window = world * batch * accumulation
    assert -(-length // accumulation) == -(-used // window)
    for step in range(-(-used // window)):
        rows = [r for part in parts for b in part[step * accumulation : (step + 1) * accumulation] for r in b]
        assert sorted(rows) == list(range(window * step, min(window * (step + 1), used)))
    assert length == len(OrderedBatchSampler(lambda _: range(used), used, batch, 0, world, used, accumulation))


@pytest.mark.parametrize(("used", "batch", "accumulation", "world"), [(9, 2, 2, 2), (41, 4, 1, 2), (7, 1, 4, 2)])
def test_a_last_step_that_cannot_be_shared(used: int, batch: int, accumulation: int, world: int) -> None:
    """One row for two processes; three rows in two batches of one each."""
    with pytest.raises(UserError, match=f"an epoch of {used} rows ends in a step of "):
        OrderedBatchSampler(lambda _: range(used), used, batch, 0, world, used, accumulation)


def test_shuffled_is_ms_swifts_order() -> None:
    from swift.dataloader import BatchSamplerShard

    theirs = BatchSamplerShard(10, 3, True, False, 42)
    theirs.set_epoch(2)
    assert [row for batch in theirs for row in batch] == shuffled(10, 42, 2)


@pytest.mark.parametrize(("world", "rows"), [(1, None), (2, (11, 11))])
def test_a_resumed_training_keeps_the_rows_of_its_first_start(world: int, rows: tuple[int, int] | None) -> None:
    """Two processes alone would leave the eleventh row out, and shuffle ten."""
    from swift_cl.training.trainer import CLTrainerMixin

    trainer: Any = object.__new__(CLTrainerMixin)
    resumed = Resumed(Path("checkpoint-2"), Layout("plain", 1, 4, 1, rows=(11, 11)), tensors=False)
    trainer.cl_session = SimpleNamespace(method=Method(None), resumed=resumed, micro_batch=4 // world, world_size=world)
    trainer.train_dataset = range(11)
    trainer.args = SimpleNamespace(train_dataloader_shuffle=True, data_seed=42, dataloader_drop_last=False)
    order = trainer._cl_order()
    assert trainer._cl_rows() == (11, 11)
    assert order is None if rows is None else order(1) == shuffled(11, 42, 1)
