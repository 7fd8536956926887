"""`--replay_mix batch`: the layout of the rows and their order in an epoch."""

import pytest

from swift_cl.errors import UserError
from swift_cl.methods.replay import order_for_batches, rows_for_batches
from tests.support.language_model import TokenContext
from tests.support.replayed import mixed, replay, stored, task_rows


@pytest.mark.parametrize(("current", "batch", "ratio", "share"), [(70, 8, 0.1, 1), (100, 10, 1.0, 5), (40, 16, 0.5, 5)])
def test_every_global_batch_holds_its_share(current, batch, ratio, share):
    state = stored([50])
    own = task_rows("now", current)
    rows, record = mixed(state, own, mix="batch", ratio=ratio, global_batch=batch)
    assert rows[:current] == own
    assert record["replayed_rows"] == len(rows) - current == rows_for_batches(current, batch, share)
    assert abs(record["replayed_rows"] - current * share / (batch - share)) <= 0.5
    ctx = TokenContext(task="now", earlier=["t0"], state=state)
    ctx.rows, ctx.global_batch = own, batch
    orders = [replay(mix="batch", ratio=ratio).batch_order(ctx, len(rows), epoch) for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert replay(mix="batch", ratio=ratio).batch_order(ctx, len(rows), 0) == orders[0]
    for order in orders:
        assert sorted(order) == list(range(len(rows)))
        for start in range(0, len(rows) - batch + 1, batch):
            assert sum(i >= current for i in order[start : start + batch]) == share


@pytest.mark.parametrize(
    ("current", "batch", "share", "replayed"),
    # Batches of 3 + 2 rows: two full ones, or one and a row that is left, whose part is 2/3. Of 2 + 1: half a row is
    # rounded up. Of 5 + 3: three rows need 9/5, and two beside a full batch 6/5. Of 7 + 1: two rows need 2/7.
    [(6, 5, 2, 4), (4, 5, 2, 3), (1, 3, 1, 1), (3, 8, 3, 2), (7, 8, 3, 4), (2, 8, 1, 0)],
)
def test_the_last_batch_has_its_part_of_a_share(current, batch, share, replayed):
    assert rows_for_batches(current, batch, share) == replayed


def test_an_epoch_draws_both_kinds_of_rows_in_random_order():
    order = order_for_batches(70, 10, 8, 1, 0)
    old = [row for row in order if row >= 70]
    assert old != sorted(old)
    assert {row for row in order[:8] if row < 70} != set(range(7))


def test_the_order_depends_on_seed_and_task():
    orders = set()
    for task, seed in (("now", 0), ("now", 1), ("later", 0)):
        ctx = TokenContext(task=task, earlier=["t0"], state=stored([50]))
        ctx.rows = task_rows("now", 70)
        orders.add(tuple(replay(mix="batch", seed=seed).batch_order(ctx, 80, 0)))
    assert len(orders) == 3


def test_replayed_rows_lie_anywhere_in_their_batch():
    order = order_for_batches(70, 10, 8, 1, 0)
    assert len({next(i for i, row in enumerate(order[s : s + 8]) if row >= 70) for s in range(0, 80, 8)}) > 3


def test_only_mix_batch_orders_the_rows():
    ctx = TokenContext(task="now", earlier=["t0"], state=stored([9]))
    assert replay().batch_order(ctx, 10, 0) is None
    assert replay(mix="batch").batch_order(TokenContext(), 10, 0) is None


def test_mix_batch_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="a global batch of 4 rows would hold 0 replayed ones, allowed: 1 to 3"):
        mixed(None, task_rows("now", 9), tasks=0, mix="batch", global_batch=4)
    with pytest.raises(UserError, match="would hold 8 replayed ones, allowed: 1 to 7"):
        mixed(None, task_rows("now", 9), tasks=0, mix="batch", ratio=20.0)
    ctx = TokenContext(task="now", earlier=["t0"])
    ctx.rows = task_rows("now", 70)
    with pytest.raises(UserError, match="laid out 80 rows, but the training data holds 79"):
        replay(mix="batch").batch_order(ctx, 79, 0)
