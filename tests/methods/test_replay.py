"""replay: what is mixed in, what is stored, and that no choice depends on the number of ranks."""

import copy
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.io import MethodState, load_method_state, save_method_state, sha256_json
from swift_cl.methods._embeddings import prompt_embeddings
from swift_cl.methods._row_store import RowStore, SeenTask, StoredRow, row_id
from swift_cl.methods._selection import herding_order, kmeans_order, normalised
from swift_cl.methods.replay import Replay, draw
from swift_cl.stream.readers.messages import read
from tests.support.fake_context import FakeContext
from tests.support.language_model import TokenContext, tiny_lora_model, token_row
from tests.support.ranks import on_ranks
from tests.support.replayed import mixed, replay, stored, task_rows

NEWS = Path(__file__).resolve().parents[2] / "datasets" / "continual_news_mini"
WORLD_SIZES = (1, 2, 8)


def tasks_of(rows):
    return Counter(row["messages"][0]["content"].removeprefix("you are ") for row in rows)


def test_the_first_task_is_unchanged():
    rows = task_rows("now", 20)
    before = json.dumps(rows)
    result, record = mixed(None, rows, tasks=0)
    assert result is rows
    assert json.dumps(rows) == before
    assert record is None


def test_half_a_row_is_rounded_up():
    """T6: 205 rows at ratio .1."""
    state = stored([100])
    rows, record = mixed(state, task_rows("now", 205))
    assert tasks_of(rows) == {"now": 205, "t0": 21}
    assert record["replayed_rows"] == 21


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.5])
def test_no_row_twice_before_all_were_drawn(ratio):
    state = stored([40], buffer_size=16)
    rows, _ = mixed(state, task_rows("now", 20), ratio=ratio)
    counts = Counter(row_id(row) for row in rows if row["messages"][0]["content"] == "you are t0")
    wanted = int(20 * ratio)
    assert sum(counts.values()) == wanted
    assert set(counts.values()) <= {wanted // 16, wanted // 16 + 1} - {0}
    assert len(counts) == min(16, wanted)


def test_tasks_share_the_draw_in_proportion_to_the_store():
    state = stored([100, 100, 100], buffer_size=30)
    rows, record = mixed(state, task_rows("now", 100), tasks=3, ratio=0.1)
    assert record["by_task"] == {"t0": 4, "t1": 3, "t2": 3}
    assert tasks_of(rows) == {"now": 100, "t0": 4, "t1": 3, "t2": 3}
    _, record = mixed(stored([30, 10]), task_rows("now", 80), tasks=2)
    assert record["by_task"] == {"t0": 6, "t1": 2}


def test_several_passes_over_the_store():
    """100 of 20 + 20 rows: twice all of them, each time in an order of its own, then ten of each task's."""
    rows = {task: [StoredRow.of(row, task) for row in task_rows(task, 20)] for task in ("t0", "t1")}
    store = RowStore([*rows["t0"], *rows["t1"]], [SeenTask(task, 20, 0) for task in rows])
    place = {row.id: number for number, row in enumerate(store.rows)}
    drawn = [place[row.id] for row in draw(store, 100, 0)]
    first, second, rest = drawn[:40], drawn[40:80], drawn[80:]
    whole = list(range(40))
    assert sorted(first) == sorted(second) == whole
    assert whole != first != second != whole
    old, new = ({p % 20 for p in rest if p // 20 == task} for task in (0, 1))
    assert len(old) == len(new) == 10
    assert set(range(10)) != old != new  # not the most useful ones, nor the same of both
    assert [p // 20 for p in rest] != sorted(p // 20 for p in rest)


def test_every_task_draws_and_shuffles_anew():
    state = stored([60])
    found = []
    for task in ("now", "later"):
        ctx = TokenContext(task=task, earlier=["t0"], state=state)
        replay(ratio=0.5).prepare_task(ctx, task_rows(task, 20))
        found.append(ctx.records["manifest"]["replayed"])
    assert {line["id"] for line in found[0]} != {line["id"] for line in found[1]}
    assert [line["place"] for line in found[0]] != [line["place"] for line in found[1]]


def test_rows_are_shuffled_in_and_kept_whole():
    state = stored([30])
    current = task_rows("now", 50)
    rows, _ = mixed(state, current, ratio=0.4)
    old = [place for place, row in enumerate(rows) if row["messages"][0]["content"] == "you are t0"]
    assert len(old) == 20
    assert old[0] < 10
    assert old[-1] > 60
    assert Counter(row_id(r) for r in rows if r in current) == Counter(map(row_id, current))
    others = [mixed(state, current, ratio=0.4, seed=seed)[1]["replayed"] for seed in (0, 1)]
    assert [line["place"] for line in others[0]] == old != [line["place"] for line in others[1]]
    assert {line["id"] for line in others[0]} != {line["id"] for line in others[1]}


def test_concat_takes_every_stored_row_once_in_order():
    state = stored([30], buffer_size=12)
    current = task_rows("now", 5)
    rows, record = mixed(state, current, mix="concat")
    assert rows[:5] == current
    assert rows[5:] == [line["row"] for line in state.rows["store"]]
    assert record["replayed_rows"] == 12
    assert record["ratio"] is None


def test_too_few_rows_to_replay_one_is_said():
    ctx = TokenContext(task="now", earlier=["t0"], state=stored([30]))
    assert len(replay().prepare_task(ctx, task_rows("now", 4))) == 4
    assert "no row is replayed" in ctx.notices[0]


def test_the_record_says_what_was_drawn():
    state = stored([30])
    current = task_rows("now", 20)
    rows, record = mixed(state, current, ratio=0.5, seed=0)
    assert record["data_sha256"] == sha256_json(rows)
    assert {key: record[key] for key in ("task", "mix", "ratio", "seed", "current_rows", "replayed_rows")} == {
        "task": "now",
        "mix": "shuffle",
        "ratio": 0.5,
        "seed": 0,
        "current_rows": 20,
        "replayed_rows": 10,
    }
    assert record["stored_by"] == {"strategy": "random", "budget": "total", "buffer_size": 1000, "seed": 0}
    for line in record["replayed"]:
        assert row_id(rows[line["place"]]) == line["id"]
        assert rows[line["place"]]["messages"][0]["content"] == f"you are {line['task']}"


def test_the_record_tells_how_the_stage_before_stored_and_names_every_task():
    state = stored([30, 30], strategy="class_balanced", buffer_size=40)
    _, record = mixed(state, task_rows("now", 20), tasks=2, ratio=0.05)
    assert record["stored_by"]["strategy"] == "class_balanced"
    assert record["by_task"] == {"t0": 1, "t1": 0}


STRATEGIES = [
    {"strategy": "random"},
    {"strategy": "reservoir"},
    {"strategy": "class_balanced"},
    {"strategy": "class_balanced", "class_key": "kind"},
    {"strategy": "kmeans", "clusters": 4},
    {"strategy": "kmeans", "embed": "tfidf"},
    {"strategy": "herding"},
    {"strategy": "herding", "embed": "tfidf", "class_key": "kind"},
]


@pytest.mark.parametrize("settings", STRATEGIES, ids=lambda s: "-".join(map(str, s.values())))
def test_the_choice_is_the_same_for_any_number_of_ranks(settings):
    """T7: same store and same draw for world size 1, 2, 8, and when run again."""
    settings = {**settings, "buffer_size": 10}
    model = tiny_lora_model()

    def both_tasks(world_size):
        def work(ctx):
            ctx.rows = task_rows(ctx.task, 23 if ctx.task == "t0" else 14, kind=["x", "y", "z"])
            return replay(**settings).end_task(ctx)

        def make(task, earlier, state):
            # Each rank has its own copy of the model, as processes do.
            return lambda r, n: TokenContext(
                copy.deepcopy(model), task=task, earlier=earlier, state=state, rank=r, world_size=n
            )

        first = on_ranks(world_size, make("t0", [], None), work)[0]
        second = on_ranks(world_size, make("t1", ["t0"], first), work)[0]
        drawn = mixed(
            second, task_rows("now", 30, kind=["x", "y"]), 2, world_size=world_size, **{**settings, "ratio": 0.2}
        )
        return first, second, drawn

    expected = both_tasks(1)
    sizes = [len(expected[1].rows["store"]), len(expected[0].rows["store"])]
    assert sizes == [10, 10]
    for world_size in (*WORLD_SIZES, 1):
        found = both_tasks(world_size)
        assert [state.rows for state in found[:2]] == [state.rows for state in expected[:2]]
        assert [state.meta for state in found[:2]] == [state.meta for state in expected[:2]]
        assert found[2] == expected[2]


def test_replayed_rows_are_earlier_training_rows_and_no_test_rows(tmp_path):
    """T7 on the bundled data: own system prompt, from an earlier stage's training file, in no test file."""
    years = ("2022", "2023", "2024")
    train = {y: [r.as_training_row(f"news of {y}") for r in read(NEWS / f"{y}-train.json")] for y in years}
    tests = {
        row_id(r.as_training_row(f"news of {own}"))
        for y in years
        for own in years
        for r in read(NEWS / "test_data" / f"{y}-test.json")
    }
    state = None
    for number, year in enumerate(years):
        ctx = FakeContext(task=year, earlier=years[:number], state=state)
        ctx.rows = train[year]
        rows = replay(ratio=1.5, buffer_size=40).prepare_task(ctx, train[year])
        if number:
            record = ctx.records["manifest"]
            assert record["replayed_rows"] == len(rows) - len(train[year]) > 0
            assert set(record["by_task"]) == set(years[:number])
            for line in record["replayed"]:
                row = rows[line["place"]]
                assert row["messages"][0] == {"role": "system", "content": f"news of {line['task']}"}
                assert line["id"] in {row_id(r) for r in train[line["task"]]}
                assert line["id"] not in tests
        save_method_state(tmp_path / year, "replay", replay(buffer_size=40).end_task(ctx))
        state = load_method_state(tmp_path / year, "replay")


def test_images_and_other_columns_stay_with_the_row():
    state = stored([12], FakeContext, lambda _, n: task_rows("t0", n, images=[["a.png"], ["b.png"]], label=[1, 2]))
    rows, _ = mixed(state, task_rows("now", 12), context=FakeContext, mix="concat")
    assert {tuple(row["images"]) for row in rows[12:]} == {("a.png",), ("b.png",)}
    assert all("label" in row for row in rows[12:])


def test_rows_that_the_template_drops_are_not_stored():
    class Short(TokenContext):
        max_length = 3

    state = stored([10], Short, lambda _, n: [token_row([1] * (1 + i % 3), [i]) for i in range(n)])
    assert len(state.rows["store"]) == 7
    assert state.meta["store"]["seen"][0] == {"task": "t0", "num_seen": 10, "dropped": 3, "stored": 7}
    with pytest.raises(UserError, match="task 't0': no row fits the training template"):
        stored([10], Short, lambda _, n: [token_row([1] * 9, [i]) for i in range(n)])


def unusable_first(count):
    """A task whose first row is too long for the template of `Eight`."""
    return [token_row([40] * 9, [1]), *(token_row([10 + i], [2 + i]) for i in range(count))]


class Eight(TokenContext):
    max_length = 8


@pytest.mark.parametrize("strategy", ["random", "reservoir", "class_balanced", "kmeans", "herding"])
def test_what_is_stored_are_the_rows_that_fit(strategy):
    """Row 0 does not: the places of the others, and of their classes and points, are one less among those that do."""
    settings = {"embed": "tfidf"} if strategy in ("kmeans", "herding") else {}
    rows = unusable_first(3)
    state = stored([4], Eight, lambda *_: rows, strategy=strategy, **settings)
    kept = state.rows["store"]
    assert sorted(line["row"]["messages"][1]["content"] for line in kept) == ["10", "11", "12"]
    if strategy == "class_balanced":
        assert [line["class"] for line in kept] == ["2", "3", "4"]


def test_points_are_those_of_the_prompts_that_fit():
    """Two equal prompts are nearer to the mean than a third, and of equal ones the first comes first. The second and
    third answers are alike, and the prompt that does not fit is unlike all, but neither is looked at."""
    rows = [
        token_row([40] * 9, [1]),
        token_row([11, 12, 13], [5]),
        token_row([11, 12, 13], [40, 41, 42, 43]),
        token_row([30, 31, 32], [40, 41, 42, 43]),
    ]
    # There is no model that could be asked.
    state = stored([4], Eight, lambda *_: rows, strategy="herding", embed="tfidf", buffer_size=3)
    first, *_, last = (line["row"] for line in state.rows["store"])
    assert (first, last) == (rows[1], rows[2])


def test_a_cluster_a_row_or_one_for_all():
    """Beside two equal prompts a third one is far from the centroid of all, but has a cluster of its own if it may."""
    rows = [token_row([11, 12, 13], [1]), token_row([30, 31, 32], [2]), token_row([11, 12, 13], [3])]

    def kept(clusters):
        settings = {"strategy": "kmeans", "embed": "tfidf", "buffer_size": 2, "clusters": clusters}
        return [line["row"] for line in stored([3], prepare=lambda *_: rows, **settings).rows["store"]]

    assert kept(1) == [rows[0], rows[2]]
    assert kept(2) == [rows[0], rows[1]]


def test_herding_goes_class_by_class_where_a_column_holds_the_class():
    """Of two rows one of each class, where the means alone would take two equal rows of one class."""
    rows = [{**token_row([11, 12, 13], [1]), "kind": "a"} for _ in range(4)]
    rows.append({**token_row([30, 31, 32], [1]), "kind": "b"})
    settings = {"strategy": "herding", "embed": "tfidf", "buffer_size": 2}
    state = stored([5], prepare=lambda *_: rows, class_key="kind", **settings)
    assert [line["class"] for line in state.rows["store"]] == ["a", "b"]
    alone = stored([5], prepare=lambda *_: rows, **settings).rows["store"]
    assert [line["row"]["kind"] for line in alone] == ["a", "a"]
    assert alone[0].keys() == {"id", "task", "row"}


@pytest.mark.parametrize("strategy", ["random", "reservoir", "class_balanced", "kmeans"])
def test_what_is_stored_depends_on_seed_and_task(strategy):
    settings = {"strategy": strategy, "buffer_size": 12}
    if strategy == "kmeans":
        settings.update(embed="tfidf", clusters=12)
    rows = [token_row([7 * i % 50, 11 * i % 50, 13 * i % 50], [i % 3]) for i in range(60)]

    def kept(task, seed):
        ctx = TokenContext(task=task)
        ctx.rows = rows
        return [line["id"] for line in replay(seed=seed, **settings).end_task(ctx).rows["store"]]

    assert kept("t0", 0) == kept("t0", 0) != kept("t0", 1)
    if strategy != "reservoir":  # one stream over all tasks, whatever they are called
        assert kept("t1", 0) != kept("t0", 0)


def test_a_budget_of_each_task():
    state = stored([30, 30], budget="per_task", buffer_size=10)
    assert Counter(line["task"] for line in state.rows["store"]) == {"t0": 10, "t1": 10}


def test_a_task_of_few_usable_rows_leaves_its_share_to_the_others():
    """Of 12 rows two are the new task's, though it has 20: the older one keeps its ten, and not six."""
    short, long = [token_row([1], [i]) for i in range(10)], [token_row([40] * 9, [i]) for i in range(18)]
    state = stored([10, 20], Eight, lambda number, _: short + long * number if number else short, buffer_size=12)
    assert Counter(line["task"] for line in state.rows["store"]) == {"t0": 6, "t1": 6}
    few = stored([10, 20], Eight, lambda number, _: short[:2] + long if number else short, buffer_size=12)
    assert Counter(line["task"] for line in few.rows["store"]) == {"t0": 10, "t1": 2}


def test_a_random_choice_encodes_no_more_rows_than_it_needs():
    encoded = []

    class Counting(TokenContext):
        def encode(self, rows):
            encoded.append(len(rows))
            return super().encode(rows)

    stored([600], Counting, buffer_size=5)
    assert encoded == [256]


def test_one_rank_writes_the_store():
    def work(ctx):
        ctx.rows = task_rows("t0", 5)
        return replay(buffer_size=2).end_task(ctx)

    first, second = on_ranks(2, lambda rank, size: TokenContext(task="t0", rank=rank, world_size=size), work)
    assert len(first.rows["store"]) == 2
    assert second is None


def test_reservoir_spans_tasks_whatever_their_sizes():
    state = stored([300, 30], strategy="reservoir", buffer_size=100)
    assert state.meta["store"]["stream_length"] == 330
    assert len(state.rows["store"]) == 100
    kept = Counter(line["task"] for line in state.rows["store"])
    assert 2 <= kept["t1"] <= 20  # 9 are expected; equal quotas would keep 30


@pytest.mark.parametrize("change", [{"seed": 1}, {"buffer_size": 11}, {"strategy": "random"}])
def test_a_reservoir_cannot_be_changed_midway(change):
    first = {"strategy": "reservoir", "buffer_size": 10, "seed": 0}
    state = stored([30], **first)
    name = next(iter(change))
    with pytest.raises(UserError, match=rf"--replay_{name} is .* allowed: '?{first[name]}'? as in the stage before"):
        mixed(state, task_rows("now", 9), **{**first, **change})
    with pytest.raises(UserError, match="--replay_strategy is 'reservoir', allowed: 'random' as in the stage before"):
        mixed(stored([30]), task_rows("now", 9), strategy="reservoir")
    mixed(stored([30]), task_rows("now", 9), strategy="herding", buffer_size=5)  # other strategies keep an order


@pytest.mark.parametrize("strategy", ["kmeans", "herding"])
def test_selection_by_the_models_view_of_the_prompt(strategy):
    model = tiny_lora_model()
    rows = task_rows("t0", 17)
    ctx = TokenContext(model, task="t0")
    ctx.rows = rows
    state = replay(strategy=strategy, buffer_size=6).end_task(ctx)
    points = []
    for encoded in ctx.encode(rows):
        prompt = [t for t, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label == -100]
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor([encoded["input_ids"]]), output_hidden_states=True
            )  # causal: the answer cannot change what precedes it
        points.append(output.hidden_states[-1][0, : len(prompt)].mean(0).numpy())
    points = normalised(np.stack(points))
    if strategy == "herding":
        expected = herding_order(points, 6)
    else:
        from swift_cl.methods._draws import seed32

        expected = kmeans_order(points, 20, 6, seed32(0, "t0"))
    assert [line["row"] for line in state.rows["store"]] == [rows[i] for i in expected]


def test_embeddings_see_the_prompt_and_neither_answer_nor_padding():
    model = tiny_lora_model()
    ctx = TokenContext(model)
    one = prompt_embeddings(ctx, [token_row([3, 4, 5], [6])])
    others = [token_row([3, 4, 5], [9, 9, 9]), token_row([7], [8] * 9), token_row([1, 2], [3])]
    torch.testing.assert_close(prompt_embeddings(ctx, others)[0], one[0], rtol=1e-5, atol=1e-6)
    assert prompt_embeddings(ctx, []).shape[0] == 0

    class PaddingFree(TokenContext):
        def collate(self, encoded):
            batch = super().collate(encoded)
            return {k: v.reshape(1, -1) for k, v in batch.items() if k != "attention_mask"}

    torch.testing.assert_close(
        prompt_embeddings(PaddingFree(model), others), prompt_embeddings(ctx, others), rtol=1e-5, atol=1e-6
    )


def test_fewer_rows_than_classes_or_tasks_is_said():
    ctx = TokenContext(task="t0")
    ctx.rows = task_rows("t0", 30)
    state = replay(strategy="class_balanced", buffer_size=2).end_task(ctx)
    assert [line["class"] for line in state.rows["store"]] == ["1", "2"]
    assert ctx.notices == ["1 classes of task 't0' have no stored row, e.g. ['3']"]
    assert state.meta["store"]["seen"][0]["classes"] == {"1": 1, "2": 1}
    ctx = TokenContext(task="t2", earlier=["t0", "t1"], state=stored([5, 5], buffer_size=2))
    ctx.rows = task_rows("t2", 5)
    replay(buffer_size=2).end_task(ctx)
    assert ctx.notices == ["--replay_buffer_size 2 leaves no row of tasks t2"]


def test_classes_are_checked_before_training():
    many = [token_row([1], [i]) for i in range(65)]
    with pytest.raises(UserError, match="65 different answers"):
        mixed(None, many, tasks=0, strategy="class_balanced")
    with pytest.raises(UserError, match="--replay_class_key is 'kind'"):
        mixed(None, many, tasks=0, strategy="herding", class_key="kind")
    mixed(None, many, tasks=0, strategy="herding")


def test_a_missing_store_is_an_error():
    with pytest.raises(UserError, match="no row store"):
        mixed(MethodState(), task_rows("now", 9))
    with pytest.raises(UserError, match=r"rows of tasks \['t0'\], but .* \['t0', 't1'\]"):
        mixed(stored([9]), task_rows("now", 9), tasks=2)
    empty = stored([9])
    empty.rows["store"] = []
    with pytest.raises(UserError, match="the row store is empty"):
        mixed(empty, task_rows("now", 9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"buffer_size": 0}, "--replay_buffer_size is 0, allowed: 1 or more"),
        ({"ratio": 0.0}, "--replay_ratio is 0.0, allowed: more than 0"),
        ({"ratio": float("inf")}, "--replay_ratio is inf"),
        ({"clusters": 0}, "--replay_clusters is 0, allowed: 1 or more"),
        ({"seed": -1}, "--replay_seed is -1, allowed: 0 or more"),
        ({"strategy": "reservoir", "budget": "per_task"}, "--replay_budget is 'per_task', allowed: total with"),
        ({"class_key": "kind"}, "--replay_class_key is 'kind', allowed: '', because only --replay_strategy class_bal"),
        ({"clusters": 5}, "--replay_clusters is 5, allowed: 20, because only --replay_strategy kmeans uses it"),
        ({"embed": "tfidf"}, "--replay_embed is 'tfidf', allowed: 'model', because only"),
        ({"mix": "concat", "ratio": 0.5}, "--replay_ratio is 0.5, allowed: 0.1, because only --replay_mix shuffle and"),
    ],
)
def test_values_out_of_range_or_without_effect_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        replay(**settings)


def test_support_is_narrowed_by_settings():
    assert replay().supports() == Replay.support
    assert not replay(mix="batch").supports().packing
    assert not replay(strategy="kmeans").supports().sequence_parallel
    assert not replay(strategy="herding").supports().encoder_decoder
    assert replay(strategy="kmeans", embed="tfidf").supports().sequence_parallel
    assert Replay.needs_rows
