"""Oracle tests of abscl: distances, covariance, the penalty, adapters summed, and what each of its trainings sees."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.io import MethodState, load_method_state, read_json, save_method_state
from swift_cl.methods._adapter_history import joined
from swift_cl.methods._adapters import AdapterSwitch, stored_adapter, write_adapter
from swift_cl.methods._gaussians import mean_and_scatter, shrunk_covariance, squared_distances
from swift_cl.methods._orthogonality import overlap
from swift_cl.methods._prompts import task_features
from swift_cl.methods._routing import RouteRequest
from swift_cl.methods.abscl import Abscl, AbsclConfig, in_blocks
from swift_cl.training.before import parameter_name
from tests.methods.test_dynamic_conpet import ALPHABETS, SelectorContext, rows
from tests.support.fake_context import FakeContext, FakeGradients
from tests.support.lora_pair import LoraPair
from tests.support.route_model import make_adapters, make_router
from tests.support.tiny_lora import continued, language_model, stage_adapter


def abscl(**settings: Any) -> Abscl:
    config = AbsclConfig(**settings)
    config.validate()
    return Abscl(config)


def test_a_mahalanobis_and_euclid_disagree() -> None:
    means, query = torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([[1.0, 0.8]])
    covariance = torch.diag(torch.tensor([4.0, 0.25], dtype=torch.float64))
    assert squared_distances(query, means, covariance)[0].tolist() == pytest.approx([2.81, 1.16])
    assert squared_distances(query, means, None)[0].tolist() == pytest.approx([1.64, 4.04])


def test_b_the_covariance_is_that_within_domains() -> None:
    one = mean_and_scatter(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    two = mean_and_scatter(torch.tensor([[10.0, 0.0], [10.0, 2.0], [10.0, 4.0], [10.0, 2.0]]))
    assert (one[0].tolist(), two[0].tolist()) == ([1.0, 0.0], [10.0, 2.0])
    covariance = (one[1] + two[1]) / 6
    assert torch.allclose(covariance, torch.diag(torch.tensor([1 / 3, 4 / 3], dtype=torch.float64)))
    found = shrunk_covariance(one[1] + two[1], 6, 0.1)
    assert torch.allclose(found, torch.diag(torch.tensor([0.38333333, 1.28333333], dtype=torch.float64)))


def test_c_rows_of_two_ranks() -> None:
    mean, scatter = mean_and_scatter(torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 2.0]]))
    assert mean.tolist() == pytest.approx([2, 2 / 3])
    assert scatter.flatten().tolist() == pytest.approx([8, 4, 4, 8 / 3])


@pytest.mark.parametrize(("form", "expected"), [("squared", [[2, 2, 0], [0, 0, 0]]), ("l1", [[1, 1, 0], [0, 0, 0]])])
def test_d_the_penalty_and_its_gradient(form: str, expected: list[list[float]]) -> None:
    shared = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    own = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    value, gradient = overlap(own, shared.T, form)
    assert float(value) == 2
    assert gradient.tolist() == expected


def test_e_one_adapter_adds_what_both_add() -> None:
    names = ("m.lora_A.weight", "m.lora_B.weight")
    first = dict(zip(names, (torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]])), strict=True))
    second = dict(zip(names, (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [1.0]])), strict=True))
    tensors, config = joined(first, {"r": 1, "lora_alpha": 2}, second, {"r": 1, "lora_alpha": 0.5})
    a, b = (tensors[name] for name in names)
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    added = config["lora_alpha"] / config["r"] * b @ a @ torch.tensor([1.0, 2.0])
    assert added.tolist() == [6.0, 1.0]


def test_the_penalty_acts_once_a_step_and_on_a_alone(tmp_path: Path) -> None:
    shared = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    own = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    ctx, method = FakeContext(LoraPair(own, torch.ones(2, 2))), abscl(orth_lambda=0.5)
    method._spans = {"layer.lora_A.weight": shared.T}
    grads = FakeGradients({name: torch.ones_like(p) for name, p in ctx.parameters.items()})
    method.gradients(ctx, grads)
    assert grads["layer.lora_A.weight"].tolist() == [[2, 2, 1], [1, 1, 1]]
    assert grads.written == {"layer.lora_A.weight"}
    assert ctx.logged["abscl_overlap"] == 2


# --- rows ------------------------------------------------------------------------------------------------------------


class RowContext(FakeContext):
    def encode(self, rows: Any) -> list[dict[str, Any]]:
        return [{} if "long" in row["messages"][1]["content"] else {"labels": [1]} for row in rows]


def domain_rows(task: str, count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": "q"}, {"role": "x", "content": f"{task} {i}"}]} for i in range(count)
    ]


def kept_tasks(mixed: list[dict[str, Any]]) -> Counter[str]:
    return Counter(row["messages"][1]["content"].split()[0] for row in mixed)


def test_the_shared_adapter_sees_every_domain_and_the_domain_adapter_its_own() -> None:
    method, ctx = abscl(replay_ratio=0.1), RowContext(task="old")
    ctx.phase, ctx.global_batch = "shared", 1
    first = method.prepare_task(ctx, domain_rows("old", 25))
    assert kept_tasks(first) == {"old": 3}  # 2.5, rounded half up
    state = MethodState(rows={"replay": [r.to_json() for r in method._kept(ctx, domain_rows("old", 25))]})
    ctx = RowContext(task="new", earlier=["old"], state=state)
    own = [*domain_rows("new", 4), *domain_rows("long", 30)]  # rows that the template would drop are not kept
    ctx.phase, ctx.global_batch = "shared", 1
    mixed = method.prepare_task(ctx, own)
    assert kept_tasks(mixed) == {"old": 3, "new": 3}
    assert [row for row in mixed if "old" in str(row)] == first
    ctx.global_batch = 4
    assert kept_tasks(method.prepare_task(ctx, own)) == {"old": 5, "new": 3}, "whole steps, on any number of processes"
    ctx.phase = "domain"
    assert method.prepare_task(ctx, own) is own
    ctx.phase = "warmup"
    warm = method.prepare_task(ctx, own)
    assert [row["channel"] for row in warm] == ["old"] * 4 + ["new"] * 4
    assert all(row["channel"] in row["messages"][1]["content"] for row in warm)
    assert kept_tasks(method.prepare_task(ctx, domain_rows("new", 2))) == {"old": 4, "new": 4}  # at least one is kept


def test_every_step_of_the_warm_up_is_of_one_domain() -> None:
    tasks = ["a"] * 5 + ["b"] * 2 + ["c"] * 4
    blocks = in_blocks(tasks, 4)
    assert blocks == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 5, 6, 7, 8, 9, 10]
    method, ctx = abscl(), FakeContext()
    ctx.phase, ctx.global_batch = "warmup", 4
    orders = [method.batch_order(ctx, len(blocks), epoch) for epoch in (0, 1)]
    for order in orders:
        assert order is not None
        assert sorted(order) == list(range(16))
        assert all(len({tasks[blocks[i]] for i in order[n : n + 4]}) == 1 for n in range(0, 16, 4))
    assert orders[0] != orders[1]
    with pytest.raises(UserError, match="raise --max_length"):
        method.batch_order(ctx, 15, 0)
    ctx.phase = "domain"
    assert method.batch_order(ctx, 15, 0) is None


def test_a_domain_of_one_row_is_refused() -> None:
    with pytest.raises(UserError, match="has 1 row"):
        abscl().prepare_task(RowContext(), domain_rows("old", 1))


# --- the model -------------------------------------------------------------------------------------------------------


class ModelContext(FakeContext):
    """Names parameters as the session does."""

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {parameter_name(name): parameter for name, parameter in super().parameters.items()}


def other_adapter(folder: Path, seed: int) -> Path:
    stage_adapter(folder)
    own = folder / "t0" / "adapter"
    draws = torch.Generator().manual_seed(seed)
    tensors = {name: 0.3 * torch.randn(t.shape, generator=draws) for name, t in stored_adapter(own).items()}
    write_adapter(own, tensors, read_json(own / "adapter_config.json"))
    return own


def logits(model: Any, *names: str) -> torch.Tensor:
    with torch.no_grad(), AdapterSwitch(model).active(*names):
        return model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits


def test_the_warm_up_trains_the_shared_adapter_beside_the_rows_own_domain(tmp_path: Path) -> None:
    folders = {name: other_adapter(tmp_path / name, seed) for seed, name in enumerate(("start", "shared", "domain"))}
    other_adapter(tmp_path / "old", 7)
    (tmp_path / "old" / "cl_state").mkdir()
    (tmp_path / "old" / "t0" / "adapter").rename(tmp_path / "old" / "cl_state" / "domain")
    model = continued(tmp_path / "start")
    ctx, method = ModelContext(model, earlier=["old"], folder=tmp_path), abscl()
    ctx.phase, ctx.phases = "warmup", {"shared": folders["shared"], "domain": folders["domain"]}
    method.prepare_model(ctx, model)
    for name, tensor in stored_adapter(folders["shared"]).items():
        assert torch.equal(ctx.parameters[name], tensor), name
    assert all(".default." in name for name, p in model.named_parameters() if p.requires_grad)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    model.eval()
    found = {}
    for task, active in (("old", "cl_fixed_0"), ("now", "cl_fixed_1")):
        method.window(ctx, [{"channel": [task, task]}, {"channel": [task]}])
        found[task] = model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits
        assert torch.equal(found[task], logits(model, "default", active))
    assert not torch.allclose(found["old"], found["now"], atol=1e-3)
    assert not torch.allclose(found["now"], logits(model, "default"), atol=1e-3)
    found["now"].sum().backward()
    with torch.no_grad():
        for parameter in ctx.parameters.values():
            assert parameter.grad is not None
            parameter -= parameter.grad
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())
    with pytest.raises(UserError, match="expected one domain"):
        method.window(ctx, [{"channel": ["old"]}, {"channel": ["now"]}])


@pytest.mark.parametrize("on", ["base", "shared"])
def test_what_a_domain_adapter_is_trained_on(tmp_path: Path, on: str) -> None:
    start, shared = other_adapter(tmp_path / "start", 0), other_adapter(tmp_path / "shared", 1)
    model = continued(tmp_path / "start")
    ctx, method = ModelContext(model), abscl(domain_on=on)
    ctx.phase, ctx.phases = "domain", {"shared": shared}
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    name = next(name for name in ctx.parameters if "lora_A" in name)
    assert torch.equal(method._spans[name], stored_adapter(shared)[name].T), "the penalty is against the shared A"
    for a in (name for name in ctx.parameters if "lora_A" in name):
        for other in (stored_adapter(shared)[a], stored_adapter(start)[a]):
            alike = torch.nn.functional.cosine_similarity(ctx.parameters[a].flatten(), other.flatten(), dim=0)
            assert abs(float(alike)) < 0.9, "it starts on top of the shared one, as the same seed would have it"
        assert not ctx.parameters[a.replace("lora_A", "lora_B")].any()
    model.eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits
    assert torch.equal(found, logits(model, "default", "cl_fixed") if on == "shared" else logits(model, "default"))
    assert torch.allclose(found, logits(model, "default"), atol=1e-3) == (on == "base")


def test_the_trainings_of_a_stage() -> None:
    assert [phase.name for phase in abscl().phases(True)] == ["shared", "domain", "warmup"]
    assert abscl(warmup_epochs=0.5).phases(False)[-1].flags == {"num_train_epochs": "0.5"}
    without = abscl(warmup_epochs=0.0).phases(False)
    assert [(phase.name, dict(phase.flags)) for phase in without] == [("shared", {}), ("domain", {})]


# --- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["mahalanobis", "euclidean"])
def test_questions_go_to_their_domain(tmp_path: Path, route: str) -> None:
    method = abscl(route=route)
    means: list[torch.Tensor] = []
    scatter, n_rows = torch.zeros(16, 16, dtype=torch.float64), list[int]()
    for task in ALPHABETS:
        ctx = SelectorContext(continued(tmp_path) if means else _fresh(tmp_path), task=task)
        ctx.system, own = "stage", rows(task)
        mean, own_scatter = mean_and_scatter(task_features(ctx, own))
        means.append(mean)
        scatter, n_rows = scatter + own_scatter, [*n_rows, len(own)]
    state = MethodState({"means": torch.stack(means), "scatter": scatter}, {"tasks": list(ALPHABETS), "n_rows": n_rows})
    save_method_state(tmp_path / "stage" / "cl_state", method.name, state)
    router = make_router(method, make_adapters(tmp_path / "adapters", list(ALPHABETS)), tmp_path / "stage")
    asked = [(task, row["messages"][1]) for task in ALPHABETS for row in rows(task)]
    requests = [RouteRequest((message,), dict.fromkeys(ALPHABETS, "stage")) for _, message in asked]
    routes = router.route(requests)
    right = sum(found.chosen == task for found, (task, _) in zip(routes, asked, strict=True))
    assert right >= len(asked) * (0.8 if route == "mahalanobis" else 0.5)
    nearest = torch.tensor([[found.scores[task] for task in ALPHABETS] for found in routes]).argmin(dim=1)
    assert [list(ALPHABETS)[i] for i in nearest.tolist()] == [found.chosen for found in routes]
    assert router.route(requests) == routes
    assert not method.needs_task_id()
    assert abscl(route="oracle").needs_task_id()


def _fresh(folder: Path) -> Any:
    stage_adapter(folder)
    return continued(folder)


def test_features_are_the_untouched_base_models(tmp_path: Path) -> None:
    """In training and at inference alike: the predecessor looked with an adapter in one and without it in the other."""
    ctx = SelectorContext(_fresh(tmp_path))
    ctx.system = "stage"
    found = task_features(ctx, rows("one", 3))
    ctx.model = language_model()
    assert torch.allclose(found, task_features(ctx, rows("one", 3)), atol=1e-5)


def test_no_spread_is_refused() -> None:
    with pytest.raises(UserError, match="no covariance"):
        shrunk_covariance(torch.zeros(2, 2, dtype=torch.float64), 3, 0.1)


# --- a whole stage ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_served_adapters_are_rebuilt_for_every_domain(tmp_path: Path) -> None:
    from tests.support.train import adapter, train_stage

    first, second = tmp_path / "1", tmp_path / "2"
    train_stage("abscl", "2022", first, max_steps=1)
    train_stage("abscl", "2023", second, first, max_steps=1)
    stored = {name: stored_adapter(second / "cl_state" / name) for name in ("shared", "domain")}
    old = {name: stored_adapter(first / "cl_state" / name) for name in ("shared", "domain")}
    served = stored_adapter(second / "cl_state" / "served" / "2022")
    config = read_json(second / "adapter" / "adapter_config.json")
    assert config["r"] == 2 * read_json(first / "cl_state" / "domain" / "adapter_config.json")["r"]
    assert config == read_json(second / "cl_state" / "served" / "2022" / "adapter_config.json")
    own = {name.removeprefix("base_model.model."): tensor for name, tensor in adapter(second).items()}
    for name, tensor in stored["shared"].items():
        dim = 0 if "lora_A" in name else 1
        assert torch.equal(own[name], torch.cat([tensor, stored["domain"][name]], dim))
        assert torch.equal(served[name], torch.cat([tensor, old["domain"][name]], dim))
    for name in (name for name in old["shared"] if "lora_A" in name):
        alike = torch.nn.functional.cosine_similarity(
            *(old[part][name].flatten() for part in ("shared", "domain")), dim=0
        )
        assert abs(float(alike)) < 0.5, "the domain adapter began on top of the shared one"
    moved = [name for name in stored["shared"] if not torch.equal(stored["shared"][name], old["shared"][name])]
    assert moved, "the shared adapter learned nothing from the second domain"
    route = read_json(second / "stage.json")["route"]
    assert [(c["name"], c["dir"]) for c in route["candidates"]] == [
        ("2022", "cl_state/served/2022"),
        ("2023", "adapter"),
    ]
    state = load_method_state(second / "cl_state", "abscl")
    assert state.tensors["means"].shape[0] == len(state.meta["n_rows"]) == 2
    assert not list((second / "cl_data" / "abscl").iterdir()), "the trainings before the last are gone"


@pytest.mark.slow
def test_a_stopped_stage_trains_no_phase_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second of three trainings: the first one is found finished. Both ways end at the same weights."""
    from swift_cl.training.session import Session
    from tests.support.train import adapter, train_stage

    begun: list[str] = []
    original = Session.attach

    def attach(self: Any, trainer: Any) -> None:
        begun.append(self.phase)
        if len(begun) == 2:
            raise KeyboardInterrupt
        original(self, trainer)

    monkeypatch.setattr(Session, "attach", attach)
    with pytest.raises(KeyboardInterrupt):
        train_stage("abscl", "2022", tmp_path / "1", max_steps=1)
    train_stage("abscl", "2022", tmp_path / "1", max_steps=1)
    assert begun == ["shared", "domain", "domain", "warmup"]
    train_stage("abscl", "2022", tmp_path / "2", max_steps=1)
    for name, tensor in adapter(tmp_path / "1").items():
        assert torch.equal(tensor, adapter(tmp_path / "2")[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orth_lambda": -0.1}, "--abscl_orth_lambda is -0.1, allowed: a number >= 0"),
        ({"warmup_epochs": -1.0}, "--abscl_warmup_epochs is -1.0, allowed: a number >= 0"),
        ({"replay_ratio": 0.0}, r"--abscl_replay_ratio is 0.0, allowed: a number in \(0, 1\]"),
        ({"shrinkage": 1.1}, r"--abscl_shrinkage is 1.1, allowed: a number in \(0, 1\]"),
        ({"stats_rows": 1}, "--abscl_stats_rows is 1, allowed: 0, or a whole number >= 2"),
        ({"route_batch": 0}, "--abscl_route_batch is 0, allowed: a whole number >= 1"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        abscl(**settings)
