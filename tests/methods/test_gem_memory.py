"""gem's memory: which rows are kept and used, and what their gradient is."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.methods._spread import Layout
from swift_cl.methods.gem import Gem, GemConfig, MemoryRow, memory_batch, memory_gradient
from tests.support.fake_context import FakeGradients
from tests.support.language_model import TokenContext, tiny_lora_model, token_row
from tests.support.linear_memory import Linear, VectorContext, begun, gradients, memory, vector_row
from tests.support.ranks import on_ranks


def test_memory_batches_follow_seed_step_and_task():
    rows = [MemoryRow({"number": i}, 1) for i in range(30)]

    def numbers(size, world, seed, step, task):
        return [row.encoded["number"] for row in memory_batch(rows, size, world, seed, step, task)]

    first = numbers(8, 1, 0, 5, "a")
    assert first == numbers(8, 2, 0, 5, "a")
    assert len(set(first)) == 8
    assert len({tuple(numbers(8, 1, *key)) for key in ((0, 5, "a"), (1, 5, "a"), (0, 6, "a"), (0, 5, "b"))}) == 4
    assert numbers(0, 1, 0, 5, "a") == list(range(30))
    assert len(numbers(2, 4, 0, 5, "a")) == 4  # raised to the number of ranks
    assert len(numbers(99, 1, 0, 5, "a")) == 30


@pytest.mark.parametrize(("seed", "step"), [(0, 5), (3, 5), (3, 6)])
def test_a_step_uses_the_memory_batch_of_its_seed_and_number(seed, step):
    """30 rows with different gradients, one a step: the gradient says which row it was."""
    tasks = {task: [(float(i + 1), offset) for i in range(30)] for task, offset in (("a", 0.0), ("b", 100.0))}
    method, ctx = begun(tasks, step=step, seed=seed, mem_batch=1)
    method.gradients(ctx, gradients((1.0, 0.0)))
    numbered = [MemoryRow({"number": i}, 1) for i in range(30)]
    for task, gradient in zip(tasks, method._gradients, strict=True):
        (row,) = memory_batch(numbered, 1, 1, seed, step, task)
        assert gradient[:2].tolist() == pytest.approx([row.encoded["number"] + 1, 100.0 if task == "b" else 0.0])


def test_memory_gradients_are_computed_in_statistics_mode():
    """So that dropout is off; the training's own forward is not."""

    class Watching(VectorContext):
        @contextmanager
        def statistics_mode(self):
            self.entered = True
            yield
            self.entered = False

        def collate(self, encoded):
            assert self.entered
            return super().collate(encoded)

    ctx = Watching(Linear(2), earlier=["old"], state=memory(old=[(-0.5, 1.0)]))
    method = Gem(GemConfig())
    method.train_begin(ctx)
    method.gradients(ctx, gradients((1.0, 0.0)))
    assert ctx.entered is False


def test_ranks_share_the_memory_gradients_of_full_fine_tuning():
    """theta has 4 numbers and `unused` 2, so of two ranks each keeps 2 + 1; of an adapter each keeps all."""

    def kept(model, state):
        def work(ctx):
            method = Gem(GemConfig())
            method.train_begin(ctx)
            grads = FakeGradients({name: torch.zeros_like(p) for name, p in ctx.parameters.items()})
            method.gradients(ctx, grads)
            return [len(gradient) for gradient in method._gradients]

        def make(rank, size):
            kind = VectorContext if isinstance(model, Linear) else TokenContext
            return kind(model, earlier=["old"], state=state, rank=rank, world_size=size)

        return on_ranks(2, make, work)

    assert kept(Linear(4), memory(old=[(1.0, 2.0, 3.0, 4.0)])) == [[3], [3]]
    adapted = tiny_lora_model()
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert kept(adapted, memory(old=[token_row([3, 4], [5])])) == [[count], [count]]


class Translating(Linear):
    """Named an encoder-decoder, whose logits stand at the labels, so that the first label counts."""

    config = SimpleNamespace(is_encoder_decoder=True)


def test_the_first_label_of_an_encoder_decoder_counts():
    rows = [vector_row((1.0, 0.0), (0, -100))]
    ctx = VectorContext(Translating(2), task="new", earlier=["old"], state=memory(old=rows))
    ctx.rows = rows
    method = Gem(GemConfig())
    method.train_begin(ctx)
    assert ctx.notices == []
    assert [line["task"] for line in method.end_task(ctx).rows["store"]] == ["old", "new"]


def test_memory_rows_without_label_tokens_are_dropped_with_a_count():
    rows = [(-0.5, 1.0), vector_row((9.0, 9.0), (-100, -100)), vector_row((9.0, 9.0), (0, -100))]
    method, ctx = begun({"old": rows}, margin=0.0)
    assert ctx.notices == ["2 of 3 memory rows of task 'old' have no label token"]
    grads = gradients((1.0, 0.0))
    method.gradients(ctx, grads)
    assert grads["theta"].tolist() == pytest.approx([0.8, 0.4], abs=1e-5)


def test_a_task_without_usable_memory_is_an_error():
    with pytest.raises(UserError, match=r"gem\.json: no memory row of task 'b'"):
        begun({"a": [(1.0, 0.0)], "b": [vector_row((1.0, 0.0), (-100, -100))]})


def test_a_missing_memory_is_found_before_the_model_is_loaded():
    method = Gem(GemConfig())
    rows = [vector_row((1.0, 0.0))]
    assert method.prepare_task(VectorContext(), rows) is rows
    with pytest.raises(UserError, match="no row store"):
        method.prepare_task(VectorContext(earlier=["old"], state=MethodState()), rows)
    assert method.prepare_task(VectorContext(earlier=["old"], state=memory(old=[(1.0, 0.0)])), rows) is rows


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_memory_grows_by_a_random_sample_of_each_task(world_size):
    rows = [token_row([i], [2] if i % 5 else []) for i in range(40)]

    def work(ctx):
        ctx.rows = rows
        return Gem(GemConfig(memory_size=6)).end_task(ctx)

    def make(rank, size):
        return TokenContext(task="a", rank=rank, world_size=size)

    first = on_ranks(world_size, make, work)[0]
    lines = first.rows["store"]
    assert len(lines) == 6
    assert all(line["row"]["messages"][-1]["content"] for line in lines)  # rows without an answer are not eligible
    assert [line["row"] for line in lines] != [row for row in rows if row["messages"][-1]["content"]][:6]
    assert first.rows == work(TokenContext(task="a")).rows

    def second(rank, size):
        return TokenContext(task="b", earlier=["a"], state=first, rank=rank, world_size=size)

    both = on_ranks(world_size, second, work)[0]
    assert [line["task"] for line in both.rows["store"]] == ["a"] * 6 + ["b"] * 6
    assert both.rows["store"][:6] == lines
    assert both.meta["store"]["settings"] == {
        "strategy": "random",
        "budget": "per_task",
        "buffer_size": 6,
        "seed": 0,
    }


def test_what_is_stored_depends_on_seed_and_task():
    rows = [token_row([i], [2]) for i in range(40)]

    def stored(seed, task):
        ctx = TokenContext(task=task)
        ctx.rows = rows
        state = Gem(GemConfig(memory_size=6, seed=seed)).end_task(ctx)
        assert state.meta["store"]["settings"]["seed"] == seed
        return tuple(line["row"]["messages"][1]["content"] for line in state.rows["store"])

    assert stored(0, "a") == stored(0, "a")
    assert len({stored(seed, task) for seed in (0, 1) for task in ("a", "b")}) == 4


def test_the_store_says_how_many_rows_it_saw_and_dropped():
    """Of ten rows four have no answer; all ten are looked at, because only six can be stored."""
    ctx = TokenContext(task="a")
    ctx.rows = [token_row([i], [2] if i < 6 else []) for i in range(10)]
    state = Gem(GemConfig(memory_size=9)).end_task(ctx)
    assert state.meta["store"]["seen"] == [{"task": "a", "num_seen": 10, "dropped": 4, "stored": 6}]


def test_a_task_without_an_answer_cannot_be_remembered():
    ctx = TokenContext(task="a")
    ctx.rows = [token_row([1, 2], []), token_row([3], [])]
    with pytest.raises(UserError, match="task 'a': no row has a label token"):
        Gem(GemConfig()).end_task(ctx)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("world_size", "spread"), [(1, False), (2, False), (2, True)])
def test_memory_gradient_of_a_real_model_is_the_token_mean(checkpointing, world_size, spread):
    """Equal to backward of transformers' own loss over all rows at once; p.grad stays as it was."""
    data = [token_row([3, 4, 5], [6, 7]), token_row([8], [9, 10, 11, 12]), token_row([1, 2], [3])]
    model = tiny_lora_model(checkpointing)
    whole = TokenContext(model)
    names = list(whole.parameters)
    model(**whole.collate(whole.encode(data))).loss.backward()
    expected = torch.cat([whole.parameters[name].grad.reshape(-1) for name in names])
    model.zero_grad(set_to_none=True)

    def work(ctx):
        ctx.micro_batch = 1
        layout = Layout(ctx, {name: p.shape for name, p in ctx.parameters.items()}, spread)
        batch = [MemoryRow.of(encoded) for encoded in ctx.encode(data)]
        found = memory_gradient(ctx, batch, layout)
        assert len(found) <= len(expected) * (0.51 if spread else 1)
        return torch.cat([tensor.reshape(-1) for _, tensor in layout.whole(found)])

    for found in on_ranks(world_size, lambda rank, size: TokenContext(model, rank=rank, world_size=size), work):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())
