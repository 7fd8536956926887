"""Oracle tests of adapter_cl: which tokens are scored, who is chosen, what the weight of the prompt does."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_cl.errors import RunFailure, UserError
from swift_cl.io import MethodState, save_method_state
from swift_cl.methods import adapter_cl
from swift_cl.methods._prompts import mean_nll, over_rows, span_of_question
from swift_cl.methods._routing import Candidate, RouteRequest, largest, smallest
from swift_cl.methods.adapter_cl import AdapterCl, AdapterClConfig
from swift_cl.methods.base import EarlierTask
from swift_cl.serving.routing.model import RouteModel, StageRouter
from swift_cl.training.before import parameter_name
from tests.support.fake_context import FakeContext
from tests.support.ranks import on_ranks
from tests.support.route_model import CharacterTemplate, make_adapters, make_router
from tests.support.tiny_lora import language_model

TASKS = ("one", "two", "three")
TEXTS = ("ab", "hello there, this is longer", "xyz")


def requests(texts: tuple[str, ...] = TEXTS, systems: dict[str, str | None] | None = None) -> list[RouteRequest]:
    given = systems or dict.fromkeys(TASKS)
    return [RouteRequest(({"role": "user", "content": text},), given) for text in texts]


class Prices:
    """A model that gives token i of a row the negative log-likelihood `prices[row][i]`, over two tokens."""

    def __init__(self, prices: list[list[float]]) -> None:
        self.prices = torch.tensor(prices, dtype=torch.float64)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        chosen = -self.prices[:, 1:]
        other = torch.log1p(-chosen.exp())
        ones = input_ids[:, 1:].bool()
        steps = torch.stack((torch.where(ones, other, chosen), torch.where(ones, chosen, other)), dim=-1)
        return SimpleNamespace(logits=torch.cat((steps, torch.zeros_like(steps[:, :1])), dim=1))


def test_padding_and_the_first_token_are_not_scored() -> None:
    """Means 2 and 1 choose B; with the three pads in it, 0.8 and 2.2 would choose A."""
    few = 1e-9
    rows, spans = [[1, 1, 1], [1, 1, 1, 1, 1, 1]], [(1, 3), (1, 3)]
    a = mean_nll(Prices([[9, 2, 2, few, few, few]] * 2), rows, spans, "cpu")[0]
    b = mean_nll(Prices([[9, 1, 1, 3, 3, 3]] * 2), rows, spans, "cpu")[0]
    assert (float(a), float(b)) == pytest.approx((2.0, 1.0), abs=1e-5)
    assert (math.exp(a), math.exp(b)) == pytest.approx((7.389056, 2.718282), abs=1e-4)


@pytest.mark.parametrize(
    ("ids", "empty", "span"),
    [
        ([1, 2, 7, 8, 9, 3, 4], [1, 2, 3, 4], (2, 5)),  # the template on both sides
        ([1, 2, 3, 3, 4], [1, 2, 3, 4], (3, 4)),  # a question that looks like the template counts once
        ([7, 8, 3], [3], (1, 2)),  # nothing before: the first token is never scored
        ([1, 2, 3, 4], [1, 2, 3, 4], (1, 4)),  # an empty question: all there is
    ],
)
def test_the_question_is_what_the_template_does_not_write(
    ids: list[int], empty: list[int], span: tuple[int, int]
) -> None:
    assert span_of_question(ids, empty) == span


def test_the_least_surprised_adapter_is_chosen_in_one_batch_or_one_by_one(tmp_path: Path) -> None:
    candidates = make_adapters(tmp_path, TASKS)
    together = make_router(AdapterCl(AdapterClConfig()), candidates).route(requests())
    alone = [make_router(AdapterCl(AdapterClConfig(route_batch=1)), candidates).route([r])[0] for r in requests()]
    for one, other in zip(together, alone, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
        assert one.chosen == other.chosen == min(one.scores, key=lambda name: one.scores[name])


def price(adapter: Path, question: str, places: Sequence[int]) -> float:
    """Mean of -log p at these places of `[1, 2] + question + [3, 4]`, by PEFT's own forward."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(language_model(), str(adapter)).eval()
    ids = torch.tensor([[1, 2, *(5 + ord(c) % 50 for c in question), 3, 4]])
    logp = model(input_ids=ids).logits[0].log_softmax(-1)
    return -sum(float(logp[p - 1, ids[0, p]]) for p in places) / len(places)


def test_the_score_says_which_tokens_count(tmp_path: Path) -> None:
    """'content' the question's three alone, 'prompt' all but the first; in one process, neither takes the other's."""
    candidates = make_adapters(tmp_path, TASKS[:2])
    shared = RouteModel(lambda: (language_model().eval(), CharacterTemplate()))
    for score, places in (("content", (2, 3, 4)), ("prompt", (1, 2, 3, 4, 5, 6))):
        method = AdapterCl(AdapterClConfig(score=score))
        (found,) = StageRouter(method, tmp_path, list(TASKS[:2]), candidates, shared).route(requests(("xyz",)))
        for name in TASKS[:2]:
            assert found.scores[name] == pytest.approx(math.exp(price(tmp_path / name, "xyz", places)), rel=1e-4)


def test_route_batch_is_the_number_of_questions_in_a_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def counted(model: Any, rows: Any, *rest: Any) -> torch.Tensor:
        sizes.append(len(rows))
        return mean_nll(model, rows, *rest)

    monkeypatch.setattr(adapter_cl, "mean_nll", counted)
    make_router(AdapterCl(AdapterClConfig(route_batch=2)), make_adapters(tmp_path, TASKS[:1])).route(requests())
    assert sizes == [2, 1]


def test_of_equal_scores_the_first_counts() -> None:
    assert smallest({"a": 2.0, "b": 1.0, "c": 1.0}) == "b"
    assert largest({"a": 1.0, "b": 2.0, "c": 2.0}) == "b"


def test_the_router_needs_the_task_only_where_it_is_told_it() -> None:
    needed = {name: AdapterCl(AdapterClConfig(router=name)).needs_task_id() for name in ("ppl", "calibrated", "oracle")}
    assert needed == {"ppl": False, "calibrated": False, "oracle": True}


def test_a_later_task_leaves_the_scores_of_the_earlier_ones_as_they_were(tmp_path: Path) -> None:
    candidates = make_adapters(tmp_path, TASKS)
    two = make_router(AdapterCl(AdapterClConfig()), candidates[:2]).route(requests())
    three = make_router(AdapterCl(AdapterClConfig()), candidates).route(requests())
    for before, after in zip(two, three, strict=True):
        assert before.scores == {name: after.scores[name] for name in before.scores}


def test_each_adapter_is_scored_under_its_own_system_prompt_and_once_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = make_adapters(tmp_path, TASKS[:2])
    router = make_router(AdapterCl(AdapterClConfig()), candidates)
    plain = router.route(requests())
    said = router.route(requests(systems={"one": None, "two": "News."}))
    assert [r.scores["one"] for r in said] == [r.scores["one"] for r in plain]
    assert all(a.scores["two"] != b.scores["two"] for a, b in zip(said, plain, strict=True))

    def never(*args: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(adapter_cl, "mean_nll", never)
    assert router.route(requests()) == plain


def test_equal_scores_choose_the_earlier_task(tmp_path: Path) -> None:
    first = make_adapters(tmp_path, TASKS[:1])[0]
    again = Candidate("again", ("again",), first.dir)
    router = make_router(AdapterCl(AdapterClConfig()), [first, again])
    assert {route.chosen for route in router.route(requests(systems={"one": None, "again": None}))} == {"one"}


def test_calibrated_measures_in_each_adapters_own_deviations(tmp_path: Path) -> None:
    candidates = make_adapters(tmp_path, TASKS[:2])
    plain = make_router(AdapterCl(AdapterClConfig()), candidates).route(requests())
    numbers = {"one": {"nll_mean": 1.0, "nll_std": 0.5}, "two": {"nll_mean": 4.0, "nll_std": 0.0}}
    save_method_state(tmp_path / "stage" / "cl_state", "adapter_cl", MethodState(meta={"router": numbers}))
    method = AdapterCl(AdapterClConfig(router="calibrated"))
    for before, after in zip(plain, make_router(method, candidates, tmp_path / "stage").route(requests()), strict=True):
        wanted = {"one": (math.log(before.scores["one"]) - 1) / 0.5, "two": math.log(before.scores["two"]) - 4}
        assert after.scores == pytest.approx(wanted, abs=1e-5)
        assert after.chosen == min(wanted, key=lambda name: wanted[name])


def test_a_likelihood_that_is_no_number_is_not_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = make_adapters(tmp_path, TASKS[:2])
    monkeypatch.setattr(adapter_cl, "mean_nll", lambda model, rows, *rest: torch.full((len(rows),), float("nan")))
    with pytest.raises(RunFailure, match="no finite likelihood"):
        make_router(AdapterCl(AdapterClConfig()), candidates).route(requests())
    # One that is merely absurd is a number: its perplexity would be beyond the largest.
    monkeypatch.setattr(adapter_cl, "mean_nll", lambda model, rows, *rest: torch.full((len(rows),), 800.0))
    routes = make_router(AdapterCl(AdapterClConfig()), candidates).route(requests())
    assert [route.chosen for route in routes] == ["one"] * 3


class AskingContext(FakeContext):
    """Encodes prompts by characters, and names parameters as the session does."""

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {parameter_name(name): parameter for name, parameter in super().parameters.items()}

    def encode_prompts(self, prompts: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        return [CharacterTemplate().encode({"messages": prompt})["input_ids"] for prompt in prompts]


def answered(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "no part of it"}]}


def test_calibration_is_mean_and_deviation_of_the_tasks_own_questions(tmp_path: Path) -> None:
    """Of three questions, the deviation divided by 3 and not by 2; the numbers of earlier tasks stay."""
    from peft import PeftModel

    make_adapters(tmp_path, ["own"])
    questions = ("ab", "xyz", "q")
    earlier = {"t0": {"n_rows": 7, "nll_mean": 1.0, "nll_std": 2.0, "score": "content"}}
    model = PeftModel.from_pretrained(language_model(), str(tmp_path / "own")).eval()
    ctx = AskingContext(model, earlier=["t0"], state=MethodState(meta={"router": earlier}))
    ctx.rows = [answered(question) for question in questions]
    found = AdapterCl(AdapterClConfig()).end_task(ctx).meta["router"]
    prices = [price(tmp_path / "own", text, range(2, 2 + len(text))) for text in questions]
    mean = sum(prices) / 3
    assert found == {
        **earlier,
        "now": {
            "n_rows": 3,
            "nll_mean": pytest.approx(mean, rel=1e-4),
            "nll_std": pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in prices) / 3), rel=1e-3),
            "score": "content",
        },
    }


def test_calibration_draws_its_rows() -> None:
    """512 of 600: were they the first ones, all alike, there would be no deviation."""
    ctx = AskingContext(language_model().eval())
    ctx.rows = [answered("a" if number < 512 else "zzzz") for number in range(600)]
    found = AdapterCl(AdapterClConfig()).end_task(ctx).meta["router"]["now"]
    assert found["n_rows"] == 512
    assert found["nll_std"] > 1e-3


@pytest.mark.parametrize("init", ["fresh", "previous"])
def test_a_new_adapter_starts_fresh_or_where_the_task_before_ended(tmp_path: Path, init: str) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    folders = [candidate.dir for candidate in make_adapters(tmp_path, TASKS)]
    # Stands for a fresh adapter: that of "three".
    model = PeftModel.from_pretrained(language_model(), str(folders[2]), is_trainable=True)
    ctx = AskingContext(model)
    ctx.earlier = [EarlierTask(name, tmp_path, folder, tmp_path) for name, folder in zip("ab", folders, strict=False)]
    assert AdapterCl(AdapterClConfig(init=init)).prepare_model(ctx, model) is model
    wanted = load_file(folders[1 if init == "previous" else 2] / "adapter_model.safetensors")
    found = {f"base_model.model.{name}": weight for name, weight in ctx.weights().items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_the_loss_is_the_weighted_mean_over_all_tokens() -> None:
    """Weights 0.5, 0.5, 1 on losses 1, 3, 5: ms-swift gives 7 / 3, the weighted mean is 7 / 2. The 9 is on no label."""
    method = AdapterCl(AdapterClConfig(prompt_loss_weight=0.5))
    ctx = FakeContext()
    labels, scale = torch.tensor([[9, 8, -100]]), torch.tensor([[1.0, 0.5, 9.0]])
    more = torch.tensor([[7, 6, 5]]), torch.tensor([[1.0, 0.5, 1.0]])
    method.window(ctx, [{"labels": labels, "loss_scale": scale}, {"labels": more[0], "loss_scale": more[1]}])
    loss = torch.tensor(7 / 3)
    term = method.loss(ctx, None, {}, loss, None)
    assert term is not None
    assert float(loss + term) == pytest.approx(3.5)


def test_the_weights_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here 1 token of weight 0.5, on another rank 3 of weight 2.5 in all: the sums are 4 and 3."""
    method, ctx = AdapterCl(AdapterClConfig(prompt_loss_weight=0.5)), FakeContext()
    other = torch.tensor([3.0, 2.5], dtype=torch.float64)
    monkeypatch.setattr(ctx, "all_reduce_sum", lambda tensor: tensor + other)
    batch = {"labels": torch.tensor([[9, 8]]), "loss_scale": torch.tensor([[1.0, 0.5]])}
    method.window(ctx, [batch])
    term = method.loss(ctx, None, {}, torch.tensor(6.0), None)
    assert term is not None
    assert float(6 + term) == pytest.approx(8)


def test_flags_of_ms_swift_follow_from_the_weight() -> None:
    given = [(w, dict(AdapterCl(AdapterClConfig(w, "oracle")).required_flags())) for w in (0.0, 1.0, 0.25)]
    assert given == [(0.0, {}), (1.0, {"loss_scale": "all"}), (0.25, {"loss_scale": "all+prompt_weight_0.25"})]


def test_ms_swift_weighs_the_prompt_and_not_the_answer() -> None:
    from swift.loss_scale import get_loss_scale
    from swift.template import ContextType

    from swift_cl.training.loss_scale import register_loss_scale

    register_loss_scale("all+prompt_weight_0.25")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    kinds = [ContextType.OTHER, ContextType.RESPONSE, ContextType.SUFFIX]
    texts, scales = get_loss_scale("all+prompt_weight_0.25")(["user q", "a", "<end>"], kinds, messages)
    assert (texts, scales) == (["user q", "a", "<end>"], [0.25, 1.0, 1.0])
    with pytest.raises(UserError, match="hybrid thinking"):
        get_loss_scale("all+prompt_weight_0.25+ignore_empty_think")(["user q"], kinds[:1], messages)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt_loss_weight": 11.0}, r"--adapter_cl_prompt_loss_weight is 11.0, allowed: a number in \[0, 10\]"),
        ({"prompt_loss_weight": 0.0}, "which scores the prompt and would learn nothing about it"),
        ({"route_batch": 0}, "--adapter_cl_route_batch is 0, allowed: a whole number >= 1"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdapterClConfig(**values).validate()
    AdapterClConfig(prompt_loss_weight=0.0, router="oracle").validate()


def test_rows_are_dealt_to_ranks_in_whole_batches() -> None:
    seen = []
    parts = []
    for rank in range(2):
        ctx = FakeContext(rank=rank, world_size=2)

        def compute(batch: list[int], rank: int = rank) -> torch.Tensor:
            seen.append((rank, tuple(batch)))
            return torch.tensor([[float(i)] for i in batch])

        parts.append(over_rows(ctx, 5, 2, compute))
    assert seen == [(0, (0, 1)), (0, (4,)), (1, (2, 3)), (1, (0, 1))]  # the last one is discarded
    assert (parts[0] + parts[1]).flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_every_rank_has_the_rows_of_all() -> None:
    def work(ctx: FakeContext) -> list[list[float]]:
        found: list[list[float]] = over_rows(
            ctx, 5, 2, lambda batch: torch.tensor([[float(i)] for i in batch])
        ).tolist()
        return found

    found = on_ranks(2, lambda rank, size: FakeContext(rank=rank, world_size=size), work)
    assert found == [[[0.0], [1.0], [2.0], [3.0], [4.0]]] * 2
