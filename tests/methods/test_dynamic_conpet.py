"""Oracle tests of dynamic_conpet: how the head grows, the loss, the mix of a batch, and a selector that selects."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_cl.errors import RunFailure, UserError
from swift_cl.io import MethodState, load_method_state, read_json, save_method_state
from swift_cl.methods import _prompts, dynamic_conpet
from swift_cl.methods._prompts import last_token_features, questions_alone, routed_features
from swift_cl.methods._routing import RouteRequest
from swift_cl.methods.base import EarlierTask
from swift_cl.methods.dynamic_conpet import DynamicConpet, DynamicConpetConfig, batches, grown, selector_loss
from swift_cl.training.before import parameter_name
from tests.support.fake_context import FakeContext
from tests.support.route_model import CharacterTemplate, make_adapters, make_router
from tests.support.tiny_lora import continued, language_model, stage_adapter

ALPHABETS = {"one": "abcdef", "two": "uvwxyz", "three": "ABCDEF"}


def rows(task: str, count: int = 12, system: str = "stage") -> list[dict[str, Any]]:
    letters = ALPHABETS[task]
    texts = ["".join(letters[(i * k + k) % len(letters)] for k in range(1, 6)) for i in range(count)]
    return [{"messages": [{"role": "system", "content": system}, {"role": "user", "content": text}]} for text in texts]


class SelectorContext(FakeContext):
    """Encodes prompts by characters, and names parameters as the session does."""

    sizes = (8, 4)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.global_batch, self.micro_batch = self.sizes

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {parameter_name(name): parameter for name, parameter in super().parameters.items()}

    def encode_prompts(self, prompts: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        return [CharacterTemplate().encode({"messages": prompt})["input_ids"] for prompt in prompts]


def learn(folder: Path, tasks: Sequence[str], **settings: Any) -> tuple[DynamicConpet, list[FakeContext]]:
    """End the tasks one after the other, as stages in `folder`."""
    stage_adapter(folder)
    method = DynamicConpet(DynamicConpetConfig(**{"lr": 5e-3, "batch_limit": 40, **settings}))
    done: list[FakeContext] = []
    state: MethodState | None = None
    for index, task in enumerate(tasks):
        ctx = SelectorContext(continued(folder), task=task, state=state, folder=folder)
        ctx.earlier = [
            EarlierTask(t, folder / t, folder / t / "adapter", folder / t / "cl_state") for t in tasks[:index]
        ]
        ctx.system, ctx.rows = "stage", rows(task)
        state = method.end_task(ctx)
        save_method_state(folder / task / "cl_state", method.name, state)
        done.append(ctx)
    return method, done


def test_a_the_head_grows_by_a_row_of_zeros() -> None:
    known = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = grown(known, 3, 2)
    assert torch.equal(found[:2], known)
    assert found[2].tolist() == [0.0, 0.0]
    assert grown(None, 2, 3).tolist() == [[0.0] * 3] * 2


def test_b_the_loss_is_the_cross_entropy_of_the_task() -> None:
    assert float(selector_loss(torch.tensor([[2.0, 0.0, 0.0]]), [0])) == pytest.approx(0.239545, abs=1e-6)
    assert float(selector_loss(torch.zeros(1, 3), [2])) == pytest.approx(math.log(3))
    both = selector_loss(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), [0, 1])
    assert float(both) == pytest.approx(0.239545 + 1.098612, abs=1e-6)


def test_d_every_batch_is_half_old_and_old_tasks_take_turns() -> None:
    order = batches([100, 100, 100, 500], 8, 0.5, "key")
    first = next(order)
    assert Counter(task for task, _ in first) == {3: 4, 0: 2, 1: 1, 2: 1}
    counts = Counter(task for rows_ in [first, *islice(order, 2499)] for task, _ in rows_)
    assert counts == {3: 10000, 0: 3334, 1: 3333, 2: 3333}
    # Every row of a task before any of them again, the new task's too.
    new = [row for rows_ in islice(batches([3, 8], 4, 0.5, "key"), 4) for task, row in rows_ if task == 1]
    assert sorted(new) == list(range(8))
    # ... and then in another order.
    own = [row for rows_ in islice(batches([3, 8], 4, 0.5, "key"), 8) for task, row in rows_ if task == 1]
    assert sorted(own[8:]) == list(range(8))
    assert own[8:] != own[:8]
    # A quarter of eight are two old rows.
    assert Counter(t for t, _ in next(batches([50, 50], 8, 0.25, "k"))) == {0: 2, 1: 6}
    # There is at least one new and one old row, whatever the share.
    assert Counter(t for t, _ in next(batches([5, 5], 2, 0.9, "k"))) == {0: 1, 1: 1}
    assert Counter(t for t, _ in next(batches([5, 5], 2, 0.1, "k"))) == {0: 1, 1: 1}


def test_e_features_are_of_the_last_token_and_padding_changes_nothing() -> None:
    model = language_model().eval()
    prompts = [[1, 2, 9, 8, 3, 4], [1, 2, 7, 3, 4], [1, 2, 9, 8, 3, 4]]
    together = last_token_features(model, prompts, "cpu")
    alone = torch.cat([last_token_features(model, [ids], "cpu") for ids in prompts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    hidden = model.model(input_ids=torch.tensor([prompts[1]])).last_hidden_state
    assert torch.allclose(together[1], hidden[0, -1], atol=1e-5)


def test_the_stages_own_system_prompt_is_no_part_of_a_question() -> None:
    plain = [[{"role": "system", "content": ""}, {"role": "user", "content": "cfcf"}]]
    row = {"role": "user", "content": "cfcf"}
    assert questions_alone([{"messages": [{"role": "system", "content": "stage"}, row]}], "stage") == plain
    assert questions_alone([{"messages": [{"role": "system", "content": "default"}, row]}], None) == plain
    own = questions_alone([{"messages": [{"role": "system", "content": "own"}, row]}], "stage")
    assert own[0][0]["content"] == "own"
    request = RouteRequest((row,), {"one": "stage"}, "own")
    assert request.without_stage() == own[0]


def test_the_selector_selects_and_labels_do_not_move(tmp_path: Path) -> None:
    """Three tasks of disjoint alphabets, through end_task and route."""
    method, done = learn(tmp_path, list(ALPHABETS), batch_limit=120, lr=2e-2)
    state = load_method_state(tmp_path / "three" / "cl_state", method.name)
    assert state.meta["tasks"] == ["one", "two", "three"]
    assert state.tensors["head/weight"].shape == (3, 16)
    assert state.meta["last_loss"] < math.log(3) / 3
    candidates = make_adapters(tmp_path / "adapters", list(ALPHABETS))
    router = make_router(method, candidates, tmp_path / "three")
    asked = [(task, row["messages"][1]) for task in ALPHABETS for row in rows(task)]
    systems = dict.fromkeys(ALPHABETS, "stage")
    routes = router.route([RouteRequest((message,), systems) for _, message in asked])
    assert [route.chosen for route in routes] == [task for task, _ in asked]
    assert list(routes[0].scores) == list(ALPHABETS)
    assert router.route([RouteRequest((message,), systems) for _, message in asked]) == routes
    # Nothing of it stays in the model: the expert is trained, the selector is gone.
    model = done[-1].model
    assert list(model.peft_config) == ["default"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)


def test_the_expert_and_the_base_are_not_touched(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    before = {name: p.detach().clone() for name, p in continued(tmp_path).named_parameters()}
    _, done = learn(tmp_path / "run", ["one", "two"], batch_limit=3)
    stage_adapter(tmp_path)
    after = dict(done[-1].model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.usefixtures("bars_at_once")
def test_the_selector_shows_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn(tmp_path, ["one", "two"], batch_limit=3)
    assert "dynamic_conpet: selector: 100%" in (shown := capsys.readouterr().err)
    assert "3/3" in shown


def test_the_first_task_has_no_selector_and_keeps_questions_without_answers(tmp_path: Path) -> None:
    method, _ = learn(tmp_path, ["one"], memory=5)
    state = load_method_state(tmp_path / "one" / "cl_state", method.name)
    assert state.tensors == {}
    assert not (tmp_path / "one" / "cl_state" / "selector").exists()
    assert len(state.rows["memory"]) == 5
    assert {tuple(m["role"] for m in row["messages"]) for row in state.rows["memory"]} == {("system", "user")}


def test_the_memory_holds_as_many_of_every_task(tmp_path: Path) -> None:
    method, _ = learn(tmp_path, list(ALPHABETS), memory=5, batch_limit=1)
    state = load_method_state(tmp_path / "three" / "cl_state", method.name)
    assert Counter(row["task"] for row in state.rows["memory"]) == {"one": 5, "two": 5, "three": 5}


def test_the_memory_is_drawn(tmp_path: Path) -> None:
    method, _ = learn(tmp_path, ["one"], memory=5)
    state = load_method_state(tmp_path / "one" / "cl_state", method.name)
    kept = [row["messages"][1]["content"] for row in state.rows["memory"]]
    texts = [row["messages"][1]["content"] for row in rows("one")]
    assert set(kept) <= set(texts)
    assert kept != texts[:5]


def selector(folder: Path, task: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / task / "cl_state" / "selector" / "adapter_model.safetensors")


def test_the_first_steps_are_adams_in_head_and_lora(tmp_path: Path) -> None:
    """The head's first step is the rate. B sees a gradient g only at the second, the head being 0 before: its moments
    are .1 g / .19 and .001 g g / .001999, so it moves by .5263 / .7073 of the rate."""
    for limit in (1, 2):
        folder = tmp_path / str(limit)
        method, _ = learn(folder, ["one", "two"], batch_limit=limit, lr=0.01)
        head = load_method_state(folder / "two" / "cl_state", method.name).tensors["head/weight"].abs()
        b = torch.cat([tensor.flatten().abs() for name, tensor in selector(folder, "two").items() if "lora_B" in name])
        if limit == 1:
            assert not b.any()
            assert float(head.max()) == pytest.approx(0.01, rel=1e-3)
            assert float(head.median()) == pytest.approx(0.01, rel=1e-2)
        else:
            assert float(b.max()) == pytest.approx(0.007441, rel=1e-2)


@pytest.mark.parametrize(("bias", "known"), [(True, {"head/weight", "head/bias"}), (False, {"head/weight"})])
def test_head_bias_says_whether_there_is_one(tmp_path: Path, bias: bool, known: set[str]) -> None:
    method, _ = learn(tmp_path, ["one", "two"], batch_limit=1, head_bias=bias)
    tensors = load_method_state(tmp_path / "two" / "cl_state", method.name).tensors
    assert tensors.keys() == known
    assert not bias or tensors["head/bias"].shape == (2,)


def test_the_head_goes_on_from_what_it_was(tmp_path: Path) -> None:
    """One step of .01 from 100 and from biases of 5 and 7; a decay of .1 would take a further .1 of 100."""
    learn(tmp_path, ["one", "two"], batch_limit=1)
    state = load_method_state(tmp_path / "two" / "cl_state", "dynamic_conpet")
    known = {"head/weight": torch.full((2, 16), 100.0), "head/bias": torch.tensor([5.0, 7.0])}
    ctx = SelectorContext(
        continued(tmp_path), task="three", earlier=["one", "two"], folder=tmp_path,
        state=MethodState(known, state.meta, state.rows),
    )  # fmt: skip
    ctx.system, ctx.rows = "stage", rows("three")
    found = DynamicConpet(DynamicConpetConfig(lr=0.01, batch_limit=1)).end_task(ctx).tensors
    assert torch.allclose(found["head/weight"][:2], known["head/weight"], atol=0.0101, rtol=0)
    assert torch.allclose(found["head/weight"][2], torch.zeros(16), atol=0.0101)
    assert torch.allclose(found["head/bias"], torch.tensor([5.0, 7.0, 0.0]), atol=0.0101, rtol=0)


@pytest.mark.parametrize("init", ["previous", "fresh"])
def test_the_selectors_lora_starts_from_the_one_before_or_fresh(tmp_path: Path, init: str) -> None:
    """With steps of 1e-4 it stays near its start. Its rank is its own; scaling 4 is the expert's (alpha 8, r 2)."""
    learn(tmp_path, list(ALPHABETS), batch_limit=1, lr=1e-4, selector_init=init, selector_rank=3)
    before, after = selector(tmp_path, "two"), selector(tmp_path, "three")
    first = [name for name in after if "lora_A" in name]
    assert first
    assert all(after[name].shape[0] == 3 for name in first)
    near = [torch.allclose(before[name], after[name], atol=1.1e-4, rtol=0) for name in first]
    assert near == [init == "previous"] * len(first)
    config = read_json(tmp_path / "three" / "cl_state" / "selector" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (3, 12.0)


def test_the_mix_and_the_batch_are_the_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(sizes: Any, batch: int, mix: float, *key: Any) -> Any:
        asked.append((list(sizes), batch, mix))
        return batches(sizes, batch, mix, *key)

    monkeypatch.setattr(dynamic_conpet, "batches", counted)
    learn(tmp_path, ["one", "two"], batch_limit=1, mix=0.25, memory=5)
    assert asked == [([5, 12], 8, 0.25)]


def test_the_bias_counts_at_inference_and_names_are_those_of_learning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 0 and biases of 0, 5, 1: the second task, "two", whatever is asked; two questions a forward."""
    method, _ = learn(tmp_path, list(ALPHABETS), batch_limit=1, route_batch=2)
    folder = tmp_path / "three" / "cl_state"
    state = load_method_state(folder, method.name)
    state.tensors.update({"head/weight": torch.zeros(3, 16), "head/bias": torch.tensor([0.0, 5.0, 1.0])})
    save_method_state(folder, method.name, state)
    sizes = []

    def counted(model: Any, prompts: Any, device: Any) -> torch.Tensor:
        sizes.append(len(prompts))
        return last_token_features(model, prompts, device)

    monkeypatch.setattr(_prompts, "last_token_features", counted)
    router = make_router(method, make_adapters(tmp_path / "adapters", list(ALPHABETS)), tmp_path / "three")
    asked = [RouteRequest(({"role": "user", "content": text},), dict.fromkeys(ALPHABETS)) for text in ("a", "bb", "c")]
    routes = router.route(asked)
    assert [route.chosen for route in routes] == ["two"] * 3
    assert routes[0].scores == {"one": 0.0, "two": 5.0, "three": 1.0}
    assert sizes == [2, 1]


@pytest.mark.parametrize(("batch", "micro"), [(8, 4), (3, 1)])
def test_two_ranks_train_the_selector_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, micro: int
) -> None:
    """Each rank adds up its share; here the other one's share is computed in the same process. Of three rows one at a
    time the second rank has one: its second pass must not count."""
    monkeypatch.setattr(SelectorContext, "sizes", (batch, micro))
    learn(tmp_path / "one", ["one", "two"], batch_limit=2)
    whole = load_method_state(tmp_path / "one" / "two" / "cl_state", "dynamic_conpet").tensors["head/weight"]
    import threading

    barrier, shared = threading.Barrier(2, timeout=60), {}

    class Rank(SelectorContext):
        def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
            shared[self.rank] = tensor
            barrier.wait()
            total = shared[0] + shared[1]
            barrier.wait()
            return total

    folder = tmp_path / "one"
    state = load_method_state(folder / "one" / "cl_state", "dynamic_conpet")
    found: dict[int, torch.Tensor] = {}
    models = [continued(folder) for _ in range(2)]

    def work(rank: int) -> None:
        ctx = Rank(models[rank], task="two", state=state, rank=rank, world_size=2, folder=tmp_path / f"rank{rank}")
        stage = EarlierTask("one", folder / "one", folder / "one" / "adapter", folder / "one" / "cl_state")
        ctx.earlier, ctx.system, ctx.rows = [stage], "stage", rows("two")
        method = DynamicConpet(DynamicConpetConfig(lr=5e-3, batch_limit=2))
        found[rank] = method.end_task(ctx).tensors["head/weight"]

    monkeypatch.setattr(torch.random, "fork_rng", _one_at_a_time(torch.random.fork_rng))
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], whole, atol=1e-4)


def _one_at_a_time(original: Any) -> Any:
    """The two ranks are threads here, and the random state is the process's."""
    import contextlib
    import threading

    lock = threading.Lock()

    @contextlib.contextmanager
    def locked(**kwargs: Any) -> Any:
        with lock, original(**kwargs):
            yield

    return locked


def test_a_loss_that_is_no_number_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_conpet, "selector_loss", lambda logits, tasks: logits.sum() * float("nan"))
    with pytest.raises(RunFailure, match="lower --dynamic_conpet_lr"):
        learn(tmp_path, ["one", "two"], batch_limit=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_limit": 0}, "--dynamic_conpet_batch_limit is 0, allowed: a whole number >= 1"),
        ({"lr": 0.0}, "--dynamic_conpet_lr is 0.0, allowed: a number > 0"),
        ({"mix": 1.0}, r"--dynamic_conpet_mix is 1.0, allowed: a number in \(0, 1\)"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DynamicConpetConfig(**values).validate()


def test_what_a_selector_saw_of_a_question_is_not_what_another_one_sees(tmp_path: Path) -> None:
    """Stage k's selector looks with its own LoRA, on questions that the stages before have routed already."""
    first, second = (candidate.dir for candidate in make_adapters(tmp_path, ["one", "two"]))
    router = make_router(DynamicConpet(DynamicConpetConfig()), [])
    asked = [RouteRequest(({"role": "user", "content": "abc"},), {})]
    seen = [routed_features(router, "dynamic_conpet", folder, asked, 8) for folder in (first, second, None, first)]
    with router.model_with(second) as model:
        alone = last_token_features(model, [router.encode(asked[0].without_stage())], "cpu")
    assert torch.allclose(seen[1], alone, atol=1e-6)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert not torch.allclose(seen[1], seen[2], atol=1e-3)
    assert torch.equal(seen[0], seen[3])
