"""i_lora against hand-computed numbers (T1 to T7 of its specification), and its checks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.methods._hidden_states import HiddenStates
from swift_cl.methods._row_store import RowStore, SeenTask, StoredRow
from swift_cl.methods._state import pack, shapes_of
from swift_cl.methods.base import TrainingRow
from swift_cl.methods.i_lora import MEMORY, ROW_MARK, ILora, ILoraConfig
from swift_cl.methods.replay import Replay, ReplayConfig
from swift_cl.training.before import parameter_name
from tests.support.fake_context import FakeContext
from tests.support.language_model import TokenContext, token_row
from tests.support.lora_pair import LoraPair
from tests.support.ranks import on_ranks
from tests.support.replayed import stored, task_rows
from tests.support.tiny_lora import continued, stage_adapter

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def averaging(value: float, lambda_: float, earlier: bool) -> tuple[ILora, FakeContext]:
    """A method whose slow weights are `value` everywhere."""
    model = LoraPair(torch.full((1, 2), value), torch.full((2, 1), value))
    state = MethodState(pack(slow={name: p.detach().clone() for name, p in model.named_parameters()}))
    ctx = FakeContext(model, earlier=["t0"] if earlier else [], state=state)
    method = ILora(ILoraConfig(lambda_=lambda_))
    method.train_begin(ctx)
    return method, ctx


def set_weights(ctx: FakeContext, value: float) -> None:
    with torch.no_grad():
        for parameter in ctx.parameters.values():
            parameter.fill_(value)


def slow(method: ILora, ctx: FakeContext) -> float:
    """The slow weights, which are all the same here."""
    values = torch.cat([tensor.flatten() for tensor in method.export(ctx, ctx.weights()).values()])
    assert values.unique().numel() == 1
    return float(values[0])


def test_t1_average() -> None:
    method, ctx = averaging(0.0, 0.9, earlier=True)
    found = []
    for value in (1.0, 2.0, 3.0):
        set_weights(ctx, value)
        method.after_step(ctx)
        found.append(slow(method, ctx))
    assert found == pytest.approx([0.1, 0.29, 0.561])


def test_t2_the_average_moves_and_leaves_the_fast_weights_alone() -> None:
    method, ctx = averaging(0.0, 0.9, earlier=True)
    set_weights(ctx, 1.0)
    method.after_step(ctx)
    assert slow(method, ctx) > 0
    assert all(bool((weight == 1.0).all()) for weight in ctx.weights().values())


FAST, SLOW = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 2.0], [3.0, 2.0]]])


@pytest.mark.parametrize(
    ("target", "tokens", "expected"),
    [
        ("slow", [False, True], 2.0),
        ("slow", [True, True], 2 * 1.25),  # the sum over two tokens; padding that counted would give the mean 1.25
        ("max", [False, True], 0.0),
    ],
)
def test_t3_distance(target: str, tokens: list[bool], expected: float) -> None:
    method = ILora(ILoraConfig(target=target))
    assert method.distance(FAST, SLOW, torch.tensor([tokens])).item() == pytest.approx(expected)


def test_t3_the_target_max_moves_only_what_lies_below() -> None:
    method = ILora(ILoraConfig(target="max"))
    low = (SLOW - 1).requires_grad_(True)
    found = method.distance(low, SLOW, torch.ones(1, 2, dtype=torch.bool))
    assert found.item() == pytest.approx(2.0)
    found.backward()
    assert low.grad is not None
    assert low.grad.flatten().tolist() == [-1.0] * 4


def test_t4_no_gradient_flows_into_the_slow_states() -> None:
    fast, held = FAST.clone().requires_grad_(True), SLOW.clone().requires_grad_(True)
    ILora(ILoraConfig()).distance(fast, held, torch.ones(1, 2, dtype=torch.bool)).backward()
    assert held.grad is None
    assert fast.grad is not None


@pytest.mark.parametrize(("update", "expected"), [(1, 0.5), (2, 2 / 3), (9, 0.9), (999, 0.999), (5000, 0.999)])
def test_t6_warm_up_in_the_first_task_alone(update: int, expected: float) -> None:
    method = ILora(ILoraConfig())
    assert method.inertia(FakeContext(), update) == pytest.approx(expected)
    assert method.inertia(FakeContext(earlier=["t0"]), update) == 0.999


def test_t7_the_average_is_kept_in_fp32() -> None:
    method, ctx = averaging(1.0, 0.999, earlier=True)
    set_weights(ctx, 1.01)
    for _ in range(1000):
        method.after_step(ctx)
    assert slow(method, ctx) == pytest.approx(1.006323, abs=1e-5)  # 1.01 - 0.01 * 0.999^1000; in bf16 it stays at 1


# --- memory rows ---------------------------------------------------------------------------------------------------


def laid_out(method: Any, ctx: FakeContext, rows: list[TrainingRow]) -> tuple[list[TrainingRow], list[int] | None]:
    mixed = method.prepare_task(ctx, rows)
    return mixed, method.batch_order(ctx, len(mixed), 0)


def test_t4_with_gamma_0_the_rows_and_their_order_are_those_of_replay() -> None:
    rows = task_rows("now", 24)
    ours = ILora(ILoraConfig(gamma=0.0, buffer_size=6, mem_ratio=0.5))
    ctx = TokenContext(task="t0")
    ctx.rows = task_rows("t0", 12)
    model = LoraPair(torch.zeros(1, 2), torch.zeros(2, 1))
    ctx.model = model
    ours.train_begin(ctx)
    state = ours.end_task(ctx)
    theirs = stored([12], buffer_size=6, ratio=0.5, mix="batch")
    assert state.rows["store"] == theirs.rows["store"]

    found = []
    replayed = Replay(ReplayConfig(buffer_size=6, ratio=0.5, mix="batch"))
    for method, before in ((ours, state), (replayed, theirs)):
        ctx = TokenContext(task="now", earlier=["t0"], state=before)
        ctx.global_batch, ctx.rows = 6, rows
        mixed, order = laid_out(method, ctx, rows)
        found.append(([row["messages"] for row in mixed], order))
    assert found[0] == found[1]
    marks = [row[ROW_MARK] == MEMORY for row in ours.prepare_task(ctx_with(state, rows), rows)]
    assert marks == [False] * 24 + [True] * 12


def ctx_with(state: MethodState, rows: list[TrainingRow]) -> TokenContext:
    ctx = TokenContext(task="now", earlier=["t0"], state=state)
    ctx.global_batch, ctx.rows = 6, rows
    return ctx


def test_every_full_batch_has_its_memory_rows_and_a_store_never_keeps_the_mark() -> None:
    rows = task_rows("now", 24)
    state = stored([12], buffer_size=6)
    ctx = ctx_with(state, rows)
    method = ILora(ILoraConfig(mem_ratio=0.5))
    mixed, order = laid_out(method, ctx, rows)
    assert order is not None
    marks = [mixed[i][ROW_MARK] == MEMORY for i in order]
    assert [sum(marks[i : i + 6]) for i in range(0, 36, 6)] == [2] * 6
    assert ctx.records["memory"]["by_task"] == {"t0": 12}
    assert all(ROW_MARK not in line["row"] for line in state.rows["store"])


@pytest.mark.parametrize(("ratio", "batch"), [(0.01, 4), (100.0, 4)])
def test_a_ratio_that_leaves_no_room_is_refused(ratio: float, batch: int) -> None:
    ctx = TokenContext()
    ctx.global_batch = batch
    with pytest.raises(UserError, match=f"--i_lora_mem_ratio {ratio}: a global batch of 4 rows would hold"):
        ILora(ILoraConfig(mem_ratio=ratio)).prepare_task(ctx, task_rows("t0", 4))


# --- on a real model -------------------------------------------------------------------------------------------------


class Named(FakeContext):
    """Names the parameters as the session does."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        assert self.model is not None
        return {parameter_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}

    def window_mean(self, total: Tensor, window_count: Tensor) -> Tensor:
        return total * self.world_size / window_count


def later_task(folder: Path, rank: int = 0, world: int = 1, **settings: Any) -> tuple[ILora, Named]:
    """A second task: the kept adapter is slow, the state has it and the fast weights, which are 1.2 times as large."""
    model = continued(folder)
    ctx = Named(model, earlier=["gone", "t0"], folder=folder, rank=rank, world_size=world)
    kept = {name: weight.clone() for name, weight in ctx.weights().items()}
    fast = {name: weight * 1.2 for name, weight in kept.items()}
    ctx.state = MethodState(pack(slow=kept, trained=fast), {"parameters": shapes_of(kept)})
    method = ILora(ILoraConfig(**settings))
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    return method, ctx


def batch(*marks: str | None) -> dict[str, Any]:
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 64, (len(marks), 6), generator=random)
    attention = torch.ones_like(ids)
    attention[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": attention, "labels": ids, ROW_MARK: list(marks)}


def term(method: ILora, ctx: Named, given: dict[str, Any]) -> Tensor | None:
    inputs = {key: value for key, value in given.items() if key != ROW_MARK}
    method.window(ctx, [given])
    outputs = ctx.module_for_forward(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return method.loss(ctx, ctx.model, inputs, torch.tensor(0.0), outputs)


def hidden(model: Any, given: dict[str, Any], number: int = -1) -> Tensor:
    found = model(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], output_hidden_states=True
    ).hidden_states[number]
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("layers", ["last", "1,-1", "all"])
def test_the_term_is_the_distance_of_the_memory_rows_alone(tmp_path: Path, layers: str) -> None:
    stage_adapter(tmp_path)
    method, ctx = later_task(tmp_path, layers=layers, gamma=2.0)
    given = batch(MEMORY, "i_lora_current", MEMORY)
    found = term(method, ctx, given)
    slow_model = continued(tmp_path)  # its adapter is the one that was kept
    numbers = {"last": [-1], "1,-1": [1, -1], "all": [0, 1, 2]}[layers]
    real = given["attention_mask"].bool()[[0, 2]]
    expected = torch.tensor(0.0)
    for number in numbers:
        apart = (hidden(ctx.model, given, number) - hidden(slow_model, given, number))[[0, 2]]
        expected += 2.0 * apart.square().mean(-1)[real].sum() / real.sum() / len(numbers)
    assert found is not None
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.item() > 1e-4
    assert ctx.logged["i_lora_mse"] == pytest.approx(found.item() / 2)
    assert ctx.log_weights["i_lora_mse"] == int(real.sum())
    found.backward()
    assert ctx.model is not None
    for name, parameter in ctx.model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".default." in name), name


def test_the_slow_adapter_follows_the_average(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    method, ctx = later_task(tmp_path, lambda_=0.5)
    method.after_step(ctx)
    assert ctx.model is not None
    live = {name: p for name, p in ctx.model.named_parameters() if ".slow." in name}
    averaged = method.export(ctx, ctx.weights())
    assert live
    for name, parameter in live.items():
        assert torch.equal(parameter, averaged[parameter_name(name).replace(".slow.", ".")])
        assert not parameter.requires_grad


@pytest.mark.parametrize("second", [(None, None), (MEMORY, None)])
def test_t5_ranks_with_unequal_memory_rows(tmp_path: Path, second: tuple[str | None, ...]) -> None:
    """One without any adds nothing and hangs nobody; tokens count alike wherever they are."""
    stage_adapter(tmp_path)
    batches = [batch(MEMORY, MEMORY), batch(*second)]
    tasks = [later_task(tmp_path, rank, 2) for rank in range(2)]

    def work(ctx: Any) -> float:
        method, own = tasks[ctx.rank]
        own.all_reduce_sum = ctx.all_reduce_sum  # type: ignore[method-assign]
        found = term(method, own, batches[ctx.rank])
        assert found is not None
        return found.item()

    def make(rank: int, size: int) -> FakeContext:
        return FakeContext(rank=rank, world_size=size)

    found = on_ranks(2, make, work)
    total, count = 0.0, 0
    for given in batches:
        memory = [mark == MEMORY for mark in given[ROW_MARK]]
        method, ctx = later_task(tmp_path)
        alone = term(method, ctx, given)
        tokens = int(given["attention_mask"][memory].sum())
        total, count = total + (0.0 if alone is None else alone.item() * tokens), count + tokens
    assert sum(found) / 2 == pytest.approx(total / count, rel=1e-5)  # gradients are averaged over ranks
    assert found[1] > 0 or second == (None, None)


def test_without_memory_rows_there_is_no_term(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    method, ctx = later_task(tmp_path)
    assert term(method, ctx, batch(None, None)) is None


def test_the_fast_weights_are_continued_and_the_model_is_left_clean(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    method, ctx = later_task(tmp_path)
    assert ctx.state is not None
    for name, weight in ctx.weights().items():
        assert torch.equal(weight, ctx.state.tensors[f"trained/{name}"])
    store = RowStore()
    for task in ("gone", "t0"):
        store.add(SeenTask(task, 1, 0), [StoredRow.of(task_rows(task, 1)[0], task)], [1] * (1 + len(store.seen)))
    ctx.state.rows = store.state().rows
    ctx.state.meta |= store.state().meta
    ctx.rows = task_rows("now", 3)
    decoder = ctx.module_for_forward.get_decoder()
    assert decoder._forward_hooks
    state = method.end_task(ctx)
    assert not decoder._forward_hooks
    for name, weight in ctx.weights().items():  # the slow weights are those of before, the trained ones 1.2 times them
        assert torch.equal(state.tensors[f"slow/{name}"], ctx.state.tensors[f"slow/{name}"])
        assert torch.equal(state.tensors[f"trained/{name}"], weight)
        assert not torch.equal(weight, state.tensors[f"slow/{name}"])


def test_a_hidden_state_that_does_not_exist(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    model = continued(tmp_path)
    states = HiddenStates(model, [3])
    with pytest.raises(UserError, match="there is no hidden state 3, allowed: -3 to 2"):
        model(input_ids=torch.tensor([[1, 2]]))
    states.remove()
    states = HiddenStates(model, [-4])
    with pytest.raises(UserError, match="there is no hidden state -4, allowed: -3 to 2"):
        model(input_ids=torch.tensor([[1, 2]]))
    states.remove()


@pytest.mark.parametrize("layers", [[-1], None])
def test_hidden_states_are_let_go(tmp_path: Path, layers: list[int] | None) -> None:
    stage_adapter(tmp_path)
    model = continued(tmp_path)
    states = HiddenStates(model, layers)
    model(input_ids=torch.tensor([[1, 2]]))
    assert [tuple(state.shape) for state in states.take()] == [(1, 2, 16)] * (1 if layers else 3)
    assert states.take() == []
    model(input_ids=torch.tensor([[1, 2]]))
    states.remove()
    assert states.take() == []
    model(input_ids=torch.tensor([[1, 2]]))
    assert states.take() == []
    assert not model.get_decoder()._forward_pre_hooks


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(UserError, match="an encoder-decoder model has two sequences"):
        ILora(ILoraConfig()).distance(FAST, SLOW, torch.ones(1, 5, dtype=torch.bool))


def test_checkpoint_brings_back_the_average_and_its_count() -> None:
    method, ctx = averaging(0.0, 0.9, earlier=False)
    set_weights(ctx, 1.0)
    method.after_step(ctx)
    again, _ = averaging(5.0, 0.9, earlier=False)
    again.restore_checkpoint(ctx, method.checkpoint_state(ctx))
    for one in (method, again):
        one.after_step(ctx)
    assert slow(again, ctx) == slow(method, ctx) == pytest.approx(0.5 * 2 / 3 + 1 / 3)


def test_infer_fast_keeps_the_trained_weights() -> None:
    method, ctx = averaging(0.0, 0.9, earlier=True)
    method.config.infer = "fast"
    set_weights(ctx, 1.0)
    method.after_step(ctx)
    assert slow(method, ctx) == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"lambda_": 1.0},
        {"gamma": -1.0},
        {"layers": "first"},
        {"mem_ratio": 0.0},
        {"buffer_size": 0},
        {"seed": -1},
    ],
)
def test_values_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--i_lora_{next(iter(settings)).rstrip('_')} is"):
        ILoraConfig(**settings).validate()


def test_images_go_through_the_slow_forward_whole() -> None:
    from swift_cl.methods.i_lora import _of_rows

    inputs = {"input_ids": torch.zeros(3, 2), "labels": torch.zeros(3, 2), "pixel_values": torch.zeros(7, 4)}
    given, whole = _of_rows(inputs, [1])
    assert whole
    assert given["input_ids"].shape == (3, 2)
    given, whole = _of_rows(
        {"input_ids": torch.zeros(3, 2), "labels": torch.zeros(3, 2), "attention_mask": None}, [1, 2]
    )
    assert not whole
    assert given["input_ids"].shape == (2, 2)


@pytest.mark.parametrize("rows", [3, 4])
def test_planes_of_positions_are_cut_by_rows(rows: int) -> None:
    """A model that sees images has three planes of positions for rows of text too, be they three rows or not."""
    from swift_cl.methods.i_lora import _of_rows

    ids, planes = torch.arange(2 * rows).view(rows, 2), torch.arange(6 * rows).view(3, rows, 2)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": planes, "logits_to_keep": 1}
    given, _ = _of_rows(inputs, [2])
    assert given.keys() == {"input_ids", "position_ids"}  # a loss or some of the logits are not asked for
    assert given["input_ids"].tolist() == [[4, 5]]
    assert given["position_ids"].tolist() == [[[4, 5]], [[4 + 2 * rows, 5 + 2 * rows]], [[4 + 4 * rows, 5 + 4 * rows]]]


def test_rows_with_images_are_compared_with_themselves(tmp_path: Path) -> None:
    """The slow forward sees all rows then; the term is that of the memory rows, which are not the first ones."""
    stage_adapter(tmp_path)
    found = []
    for more in ({}, {"image_sizes": None}):
        method, ctx = later_task(tmp_path)
        value = term(method, ctx, {**batch(None, MEMORY, MEMORY), **more})
        assert value is not None
        found.append(value.item())
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_padding_free_collator_is_switched_off() -> None:
    from swift_cl.training.flags import complete_flags

    given = ["--cl_method", "i_lora"]
    assert complete_flags(given) == [*given, "--padding_free", "false"]
    assert complete_flags([*given, "--padding_free", "False"]) == [*given, "--padding_free", "False"]
    with pytest.raises(UserError, match="--padding_free true does not work with method 'i_lora', which needs false"):
        complete_flags([*given, "--padding_free", "true"])


# --- what a stage begins with ----------------------------------------------------------------------------------------


def test_without_a_weight_there_is_no_second_adapter(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    method, ctx = later_task(tmp_path, gamma=0.0)
    assert ctx.model is not None
    assert not any(".slow." in name for name, _ in ctx.model.named_parameters())
    assert term(method, ctx, batch(MEMORY, MEMORY)) is None


def test_other_parts_than_a_and_b_are_refused() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(UserError, match="method 'i_lora' works on the matrices A and B of LoRA"):
        ILora(ILoraConfig()).prepare_model(FakeContext(model), model)


def test_a_state_of_other_shapes_is_refused(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    method, ctx = later_task(tmp_path)
    with pytest.raises(UserError, match="the state of method 'i_lora' does not fit the trained parameters"):
        method.restore_checkpoint(ctx, MethodState(pack(slow=ctx.weights()), {"parameters": {}, "updates": 1}))
    assert ctx.state is not None
    ctx.state.meta["parameters"] = {}
    with pytest.raises(UserError, match="the state of method 'i_lora' does not fit the trained parameters"):
        ILora(ILoraConfig()).prepare_model(ctx, ctx.model)


def run_adapter(ctx: Named) -> dict[str, Tensor]:
    """The weights of the adapter 'slow' by the names of their trained twins."""
    assert ctx.model is not None
    found = [(parameter_name(name), p) for name, p in ctx.model.named_parameters() if ".slow." in name]
    return {name.replace(".slow.", "."): parameter.detach().clone() for name, parameter in found}


def test_the_adapter_that_is_run_is_the_average_even_if_the_fast_one_was_kept(tmp_path: Path) -> None:
    """At the beginning of a stage, where the state says half of what the folder holds, and after a checkpoint."""
    stage_adapter(tmp_path)
    model = continued(tmp_path)
    ctx = Named(model, earlier=["t0"], folder=tmp_path)
    kept = {name: weight.clone() for name, weight in ctx.weights().items()}
    half = {name: weight / 2 for name, weight in kept.items()}
    ctx.state = MethodState(pack(slow=half, trained=kept), {"parameters": shapes_of(kept)})
    method = ILora(ILoraConfig())
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    found = run_adapter(ctx)
    assert found.keys() == half.keys()
    assert all(torch.equal(found[name], half[name]) for name in half)

    zeros = {name: torch.zeros_like(weight) for name, weight in kept.items()}
    method.restore_checkpoint(ctx, MethodState(pack(slow=zeros), {"parameters": shapes_of(kept), "updates": 1}))
    assert not any(bool(weight.any()) for weight in run_adapter(ctx).values())


# --- the term --------------------------------------------------------------------------------------------------------


def test_the_slow_forward_is_in_statistics_mode(tmp_path: Path) -> None:
    """So that it has no dropout; the trained weights' own forward is not."""
    stage_adapter(tmp_path)
    method, ctx = later_task(tmp_path)
    inside, seen = [False], []

    @contextmanager
    def statistics_mode() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    ctx.statistics_mode = statistics_mode  # type: ignore[method-assign]
    ctx.module_for_forward.get_decoder().register_forward_hook(lambda *_: seen.append(inside[0]))
    term(method, ctx, batch(MEMORY))
    assert seen == [False, True]


def test_micro_batches_share_one_count_and_have_marks_of_their_own(tmp_path: Path) -> None:
    """The first has the memory row of four tokens, the second that of six: a mean over ten tokens."""
    stage_adapter(tmp_path)
    batches = [batch(MEMORY, None), batch(None, MEMORY)]
    alone = []
    for given in batches:
        method, ctx = later_task(tmp_path)
        found = term(method, ctx, given)
        assert found is not None
        alone.append(found.item())
    method, ctx = later_task(tmp_path)
    method.window(ctx, batches)
    together = []
    for given in batches:
        outputs = ctx.module_for_forward(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
        inputs = {key: value for key, value in given.items() if key != ROW_MARK}
        found = method.loss(ctx, ctx.model, inputs, torch.tensor(0.0), outputs)
        assert found is not None
        together.append(found.item())
    assert together == pytest.approx([0.4 * alone[0], 0.6 * alone[1]], rel=1e-5)


def test_ranks_without_any_memory_row_add_zero(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    method, ctx = later_task(tmp_path, 0, 2)
    given = batch(None, None)
    del given[ROW_MARK]  # no row of the batch has the column
    found = term(method, ctx, given)
    assert found is not None
    assert found.item() == 0.0


def test_tokens_without_a_mask_all_count() -> None:
    from swift_cl.methods.i_lora import _tokens

    for mask in (None, torch.zeros(2, 1, 3, 3)):  # that of a model which masks pairs of tokens says nothing of one
        found = _tokens({"input_ids": torch.zeros(2, 3), "attention_mask": mask}, [True, False])
        assert found.tolist() == [[True] * 3, [False] * 3]


def test_distances_are_added_up_in_fp32() -> None:
    """301 tokens with the distance 1; bf16 knows 300 and 302."""
    fast, held = torch.ones(1, 301, 1, dtype=torch.bfloat16), torch.zeros(1, 301, 1, dtype=torch.bfloat16)
    assert ILora(ILoraConfig()).distance(fast, held, torch.ones(1, 301, dtype=torch.bool)).item() == 301.0


# --- the memory ------------------------------------------------------------------------------------------------------


def remembered(
    task: str, rows: list[TrainingRow], before: MethodState | None = None, max_length: int = 1000, **settings: Any
) -> MethodState:
    """The state after a task, the second one if there is a state before it."""
    ctx = TokenContext(task=task, earlier=["t0"] if before else [], state=before)
    ctx.model, ctx.rows, ctx.max_length = LoraPair(torch.zeros(1, 2), torch.zeros(2, 1)), rows, max_length
    method = ILora(ILoraConfig(**settings))
    method.train_begin(ctx)
    return method.end_task(ctx)


def test_the_memory_is_shared_by_the_tasks() -> None:
    first = remembered("t0", task_rows("t0", 12), buffer_size=6)
    both = remembered("t1", task_rows("t1", 12), first, buffer_size=6)
    assert [line["task"] for line in both.rows["store"]] == ["t0"] * 3 + ["t1"] * 3
    assert both.rows["store"][:3] == first.rows["store"][:3]


def test_what_is_stored_depends_on_seed_and_task() -> None:
    rows = task_rows("t0", 40)
    found = {
        tuple(line["id"] for line in remembered(task, rows, buffer_size=6, seed=seed).rows["store"])
        for seed in (0, 1)
        for task in ("a", "b")
    }
    assert len(found) == 4


def test_rows_that_the_template_drops_are_counted_and_not_stored() -> None:
    """Of ten rows four are longer than allowed."""
    rows = [token_row([1] * (9 if i < 4 else 1), [2 + i]) for i in range(10)]
    state = remembered("t0", rows, max_length=5, buffer_size=9)
    assert state.meta["store"]["seen"] == [{"task": "t0", "num_seen": 10, "dropped": 4, "stored": 6}]
    with pytest.raises(UserError, match="task 't0': no row fits the training template"):
        remembered("t0", rows[:4], max_length=5)


def test_an_empty_memory_is_refused() -> None:
    store = RowStore(seen=[SeenTask("t0", 3, 3)])
    rows = task_rows("now", 24)
    with pytest.raises(UserError, match=r"i_lora\.json: the memory is empty"):
        ILora(ILoraConfig()).prepare_task(ctx_with(store.state(), rows), rows)


def test_what_is_drawn_and_its_order_depend_on_seed_task_and_epoch() -> None:
    state, rows = stored([60], buffer_size=60), task_rows("now", 24)
    drawn, orders = set(), set()
    for seed in (0, 1):
        for task in ("now", "then"):
            ctx = ctx_with(state, rows)
            ctx.task = task
            method = ILora(ILoraConfig(mem_ratio=0.5, seed=seed))
            mixed = method.prepare_task(ctx, rows)
            drawn.add(tuple(row["messages"][1]["content"] for row in mixed[24:]))
            orders |= {tuple(method.batch_order(ctx, 36, epoch) or ()) for epoch in (0, 1)}
    assert len(drawn) == 4
    assert len(orders) == 8


def test_rows_keep_a_channel_of_their_own_until_they_are_memory() -> None:
    state = stored([12], prepare=lambda number, size: task_rows("t0", size, channel=["own"]), buffer_size=12)
    rows = [*task_rows("now", 1, channel=["mine"]), *task_rows("now", 23)]
    mixed = ILora(ILoraConfig(mem_ratio=0.5)).prepare_task(ctx_with(state, rows), rows)
    assert [row[ROW_MARK] for row in mixed] == ["mine"] + ["i_lora_current"] * 23 + [MEMORY] * 12


def test_the_record_says_what_was_drawn() -> None:
    """24 rows in batches of six with two memory rows each are six batches: twelve of them, of two tasks alike."""
    rows = task_rows("now", 24)
    ctx = TokenContext(task="now", earlier=["t0", "t1"], state=stored([12, 12], buffer_size=24))
    ctx.global_batch, ctx.rows = 6, rows
    ILora(ILoraConfig(mem_ratio=0.5)).prepare_task(ctx, rows)
    record = ctx.records["memory"]
    assert (record["current_rows"], record["memory_rows"], len(record["rows"])) == (24, 12, 12)
    assert record["by_task"] == {"t0": 6, "t1": 6}


def test_the_first_task_has_the_order_of_the_trainer() -> None:
    assert ILora(ILoraConfig()).batch_order(TokenContext(), 24, 0) is None


def test_rows_that_the_template_dropped_later_are_noticed() -> None:
    rows = task_rows("now", 24)
    method = ILora(ILoraConfig(mem_ratio=0.5))
    with pytest.raises(UserError, match="laid out 36 rows, but the training data holds 35"):
        method.batch_order(ctx_with(stored([12], buffer_size=6), rows), 35, 0)


def test_half_a_memory_row_is_a_whole_one() -> None:
    """A batch of five, half of it memory."""
    ctx = TokenContext()
    ctx.global_batch = 5
    assert ILora(ILoraConfig(mem_ratio=1.0))._share_of_batch(ctx) == 3
