"""The row store: quotas, the reservoir, eligibility, and state that survives a round trip."""

from fractions import Fraction
from hashlib import sha256

import pytest

from swift_cl.errors import UserError
from swift_cl.io import MethodState, load_method_state, save_method_state
from swift_cl.methods._draws import permutation, seed32, slots_up_to
from swift_cl.methods._row_store import (
    RowStore,
    SeenTask,
    StoredRow,
    exact,
    fair_shares,
    largest_remainder,
    reservoir,
    round_half_up,
    row_id,
    usable_rows,
)
from tests.support.language_model import TokenContext, token_row
from tests.support.ranks import on_ranks


def rows(task, count, offset=0):
    return [StoredRow.of(token_row([offset + i], [offset + i + 1]), task) for i in range(count)]


def filled(budget, total, *sizes):
    store = RowStore()
    for number, size in enumerate(sizes):
        arriving = rows(f"t{number}", size, 1000 * number)
        store.add(SeenTask(f"t{number}", size, 0), arriving, store.shares(budget, total, size))
    return store


def test_quotas_of_a_total_budget_shrink_by_largest_remainder():
    """T1."""
    sizes = [[len(filled(10, True, *[100] * n).of_task(f"t{k}")) for k in range(n)] for n in (1, 2, 3, 4)]
    assert sizes == [[10], [5, 5], [4, 3, 3], [3, 3, 2, 2]]


def test_shrinking_keeps_the_head_of_each_task():
    before, after = filled(10, True, 100), filled(10, True, 100, 100)
    assert after.of_task("t0") == before.of_task("t0")[:5]


def test_per_task_budget_never_shrinks():
    store = filled(10, False, 100, 4, 100)
    assert [len(store.of_task(f"t{k}")) for k in range(3)] == [10, 4, 10]


def test_a_task_of_which_no_row_is_left_keeps_its_place():
    store = RowStore([], [SeenTask("t0", 9, 0)])
    assert store.shares(10, True, 4) == [0, 4]
    store.add(SeenTask("t1", 4, 0), rows("t1", 4), [0, 4])
    assert [len(store.of_task(task)) for task in ("t0", "t1")] == [0, 4]


@pytest.mark.parametrize(
    ("total", "available", "shares"),
    [
        (10, [3, 100], [3, 7]),
        (10, [3, 100, 100], [3, 4, 3]),
        (10, [1, 2, 3], [1, 2, 3]),
        (2, [9, 9, 9], [1, 1, 0]),
        (10, [0, 9, 9], [0, 5, 5]),
        (7, [], []),
    ],
)
def test_what_a_small_task_leaves_goes_to_the_others(total, available, shares):
    assert fair_shares(total, available) == shares


def test_largest_remainder_gives_ties_to_lower_indexes():
    assert largest_remainder(10, [30, 30, 30]) == [4, 3, 3]  # round() would give 9 in all
    assert largest_remainder(3, [2, 2]) == [2, 1]
    assert largest_remainder(10, [10, 50, 40]) == [1, 5, 4]
    assert largest_remainder(5, [1, 1, 8]) == [1, 0, 4]
    assert largest_remainder(2, [1, 1, 8]) == [0, 0, 2]  # of 0.2, 0.2 and 1.6 the last has the larger fraction
    assert largest_remainder(5, [0, 0]) == [0, 0]


def test_half_a_row_is_rounded_up():
    """T6: 205 rows at 0.1 are 20.5."""
    assert round_half_up(exact(0.1) * 205) == 21 != round(0.1 * 205)
    assert round_half_up(exact(0.29) * 50) == 15  # the float product is 14.499999999999998
    assert round_half_up(Fraction(1, 4)) == 0


def test_reservoir_follows_its_draws():
    """T3, first part: items 0..4, draws 1, 3, 0 for items 2, 3, 4."""
    stream = rows("t", 5)
    slots = reservoir([], stream, 2, 0, [0, 0, 1, 3, 0])
    assert [stream.index(row) for row in slots] == [4, 2]
    # The same in two parts; the slots that are given are not written to.
    first = reservoir([], stream[:3], 2, 0, [0, 0, 1])
    assert reservoir(first, stream[3:], 2, 3, [3, 0]) == slots
    assert [stream.index(row) for row in first] == [0, 2]


def test_reservoir_keeps_every_row_equally_often():
    """T3, second part: M = 5, n = 20, 20000 runs, inclusion .25 +- .01."""
    stream = rows("t", 20)
    place = {row.id: i for i, row in enumerate(stream)}
    counts = [0] * 20
    for run in range(20000):
        for row in reservoir([], stream, 5, 0, slots_up_to(0, 20, run)):
            counts[place[row.id]] += 1
    assert all(abs(count / 20000 - 0.25) <= 0.01 for count in counts)


def test_reservoir_is_one_stream_over_tasks():
    """Rows that arrive in two tasks fill the slots that they fill when they arrive in one."""
    stream = rows("a", 30) + rows("b", 40, 100)
    together = RowStore()
    together.stream(SeenTask("ab", 70, 0), stream, 8, 5)
    split = RowStore()
    split.stream(SeenTask("a", 30, 0), stream[:30], 8, 5)
    split.stream(SeenTask("b", 40, 0), stream[30:], 8, 5)
    assert split.rows == together.rows
    assert split.stream_length == 70
    assert split.seen == [SeenTask("a", 30, 0), SeenTask("b", 40, 0)]
    assert {row.task for row in split.rows} == {"a", "b"}
    other = RowStore()
    other.stream(SeenTask("ab", 70, 0), stream, 8, 6)
    assert other.rows != together.rows


def test_draws_are_functions_of_their_key():
    assert permutation(50, 1, "x") == permutation(50, 1, "x")
    assert sorted(permutation(50, 1, "x")) == list(range(50))
    assert len({tuple(permutation(50, seed, name)) for seed in (0, 1) for name in ("x", "y")}) == 4
    # A change of these numbers changes which rows an old run would draw.
    assert permutation(6, 0, "frozen") == [1, 5, 0, 4, 3, 2]
    assert seed32(0, "frozen") == int(sha256(b'[0, "frozen"]').hexdigest()[:8], 16) < 2**32
    assert len({seed32(seed, name) for seed in (0, 1) for name in ("x", "y")}) == 4


def test_draws_of_a_stream_can_be_continued_anywhere():
    whole = slots_up_to(0, 50, 3)
    assert all(0 <= draw <= i for i, draw in enumerate(whole))
    for first in range(12):
        assert slots_up_to(first, 20, 3) == whole[first : first + 20]
    late = slots_up_to(7_000_000, 7000, 3)
    assert all(850 < sum(draw * 7 // 7_007_000 == part for draw in late) < 1150 for part in range(7))


def test_a_row_is_what_it_says():
    row = token_row([1], [2])
    assert row_id({**row, "label": "x", "images": []}) == row_id(row)
    for part in ("images", "videos", "audios", "tools", "objects"):
        assert row_id({**row, part: ["a.png"]}) != row_id(row)
    other_system = {"messages": [{"role": "system", "content": "other"}, *row["messages"][1:]]}
    assert row_id(other_system) != row_id(row)


def test_state_survives_files(tmp_path):
    store = filled(10, True, 20, 20)
    store.rows[0] = StoredRow.of(store.rows[0].row, "t0", "class a")
    store.rows[1] = StoredRow.of(store.rows[1].row, "t0", "class b")
    store.rows[2] = StoredRow.of(store.rows[2].row, "t0", "class a")
    store.rows[:2] = store.rows[1::-1]  # b before a
    store.settings, store.stream_length = {"strategy": "random"}, 40
    save_method_state(tmp_path, "replay", store.state())
    ctx = TokenContext(earlier=["t0", "t1"], state=load_method_state(tmp_path, "replay"))
    assert RowStore.load(ctx, "replay") == store
    manifest = ctx.state.meta["store"]["seen"]
    classes = {"class a": 2, "class b": 1}
    assert manifest[0] == {"task": "t0", "num_seen": 20, "dropped": 0, "stored": 5, "classes": classes}
    assert list(manifest[0]["classes"]) == ["class a", "class b"]
    assert manifest[1] == {"task": "t1", "num_seen": 20, "dropped": 0, "stored": 5}
    assert ctx.state.rows["store"][4].keys() == {"id", "task", "row"}  # no class


def test_the_first_task_starts_with_an_empty_store():
    assert RowStore.load(TokenContext(), "replay") == RowStore()


def test_a_store_of_other_tasks_is_refused():
    state = filled(10, True, 20, 20).state()
    with pytest.raises(UserError, match=r"gem\.json: rows of tasks \['t0', 't1'\], but .* \['t0', 't2'\]"):
        RowStore.load(TokenContext(earlier=["t0", "t2"], state=state), "gem")
    for others in (["t1", "t0"], ["t0", "t1", "t2"], ["t0"]):
        with pytest.raises(UserError, match="rows of tasks"):
            RowStore.load(TokenContext(earlier=others, state=state), "gem")
    for part in (MethodState(), MethodState(rows=state.rows), MethodState(meta=state.meta)):
        with pytest.raises(UserError, match=r"replay\.json: no row store"):
            RowStore.load(TokenContext(earlier=["t0", "t1"], state=part), "replay")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_that_the_template_drops_are_not_eligible(world_size, monkeypatch):
    monkeypatch.setattr("swift_cl.methods._row_store._ENCODED_AT_ONCE", 2)
    data = [token_row([1] * (9 if i % 3 == 0 else 1), [2]) for i in range(12)]
    order = [11, 9, 7, 6, 5, 3, 1, 0, 2, 4, 8, 10]

    def make(rank, size):
        ctx = TokenContext(rank=rank, world_size=size)
        ctx.max_length = 5
        return ctx

    for kept, dropped in on_ranks(world_size, make, lambda ctx: usable_rows(ctx, data, order, 4)):
        assert (kept, dropped) == ([11, 7, 5, 1], 3)
    for kept, dropped in on_ranks(world_size, make, lambda ctx: usable_rows(ctx, data, order, 100)):
        assert (kept, dropped) == ([11, 7, 5, 1, 2, 4, 8, 10], 4)
