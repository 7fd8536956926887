"""Oracle tests of cl_moe: two gates, experts of a task, what is blended with what, and whose a question is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from swift_cl.errors import UserError
from swift_cl.io import MethodState, load_method_state, read_json, save_method_state
from swift_cl.methods._adapters import stored_adapter
from swift_cl.methods.cl_moe import ClMoe, ClMoeConfig, centres, kept_shares, nearest, task_experts
from swift_cl.tuners import register_tuners
from tests.methods.test_abscl import ModelContext
from tests.support.language_model import token_row
from tests.support.ranks import on_ranks
from tests.support.route_model import make_adapters, make_router
from tests.support.tiny_lora import language_model
from tests.tuners.test_moelora import layer, moelora_config, set_weights

register_tuners()


def cl_moe(**settings: Any) -> ClMoe:
    config = ClMoeConfig(**settings)
    config.validate()
    return ClMoe(config)


# --- the gates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 3.0), (0.5, 2.3), (1.0, 1.6)])
def test_a_the_gate_is_a_mixture_of_two(beta: float, expected: float) -> None:
    """Token's gate (.7, .1, .1, .1), task's (.1, .2, .3, .4), experts that say 1, 2, 3, 4."""
    found = layer(4, 4, 4.0, inputs=1, outputs=1)
    router = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()[:, None]
    set_weights(found, torch.ones(4, 1), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), router)
    found.new_task("default", beta)
    with torch.no_grad():
        found.moelora_task["default"].weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    assert float(found(torch.ones(1))) == pytest.approx(expected)


def test_a_new_task_begins_with_all_experts_alike() -> None:
    found = layer(4, 4, 4.0)
    found.new_task("default", 0.5)
    with torch.no_grad():
        found.moelora_task["default"].weight.fill_(3.0)
        found.moelora_task["default"].weight[0] = 9.0
    found.new_task("default", 0.25)
    assert found.moelora_task["default"]().tolist() == [0.25] * 4
    assert found.beta["default"] == 0.25
    assert found.moelora_task["default"].weight.requires_grad


def test_the_gate_is_saved_and_another_version_would_refuse_it(tmp_path: Path) -> None:
    model = get_peft_model(language_model(), moelora_config())
    model.base_model.new_task("default", 0.25)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(tmp_path))
    config = read_json(tmp_path / "adapter_config.json")
    assert (config["beta"], config["schema_version"]) == (0.25, 2)
    again = PeftModel.from_pretrained(language_model(), str(tmp_path)).eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model.eval()(ids).logits, again(ids).logits)
    with pytest.raises(ValueError, match="schema_version"):
        moelora_config(schema_version=2)
    for beta in (-0.5, 1.5):
        with pytest.raises(ValueError, match=f"beta is {beta}"):
            moelora_config(beta=beta, schema_version=2)


# --- experts and blending --------------------------------------------------------------------------------------------


def test_b_only_what_the_new_task_alone_uses_keeps_little() -> None:
    """Earlier set {0, 1}, the task's {1, 2}, gamma 0.7, theta 10 and phi 0: only expert 2 is the new task's alone."""
    shares = kept_shares(4, {0, 1}, {1, 2}, 0.7)
    assert (10 * shares).tolist() == pytest.approx([7, 7, 3, 7])


def test_c_the_largest_counts_and_the_first_of_equal_ones() -> None:
    layers = ["one", "two"]
    counts = torch.tensor([[5.0, 9.0, 9.0, 1.0], [9.0, 9.0, 9.0, 1.0]])
    assert task_experts(layers, counts, 2, "layer") == {"one": [1, 2], "two": [0, 1]}
    other = torch.tensor([[5.0, 0.0, 0.0, 4.0], [0.0, 3.0, 2.0, 2.0]])
    assert task_experts(layers, other, 2, "layer") == {"one": [0, 3], "two": [1, 2]}
    assert task_experts(layers, other, 2, "global") == {"one": [0, 3], "two": [0, 3]}  # sums 5, 3, 2, 6
    other = torch.tensor([[5.0, 0.0, 0.0, 4.0], [0.0, 9.0, 8.0, 0.0]])
    assert task_experts(layers, other, 2, "global") == {"one": [1, 2], "two": [1, 2]}  # sums 5, 9, 8, 4


def test_d_the_nearest_centre() -> None:
    found = [float(nearest(torch.tensor([[1.9, 0.1]]), torch.tensor([c]))) for c in ([0.0, 0], [4.0, 0], [0.0, 3])]
    assert found == pytest.approx([1.9026, 2.1024, 3.4670], abs=1e-4)
    several = torch.tensor([[10.0, 10.0], [2.0, 0.1]])
    assert float(nearest(torch.tensor([[1.9, 0.1]]), several)) == pytest.approx(0.1)


def test_centres_are_those_of_clusters() -> None:
    features = torch.tensor([[0.0, 0.0], [0.0, 2.0], [9.0, 9.0], [9.0, 9.0]])
    assert centres(features, 1, 0).tolist() == [[4.5, 5.0]]
    assert sorted(centres(features, 2, 0).tolist()) == [[0.0, 1.0], [9.0, 9.0]]
    assert len(centres(features[:2], 9, 0)) == 2


class ExpertContext(ModelContext):
    """Rows of token ids of several lengths, padded."""

    def encode(self, rows: Any) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            ids = [int(word) for message in row["messages"][1:] for word in message["content"].split()]
            found.append({"input_ids": ids, "labels": ids})
        return found

    def collate(self, encoded: Any) -> dict[str, torch.Tensor]:
        width = max(len(row["labels"]) for row in encoded)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in encoded])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in encoded])
        return {"input_ids": ids, "labels": ids, "attention_mask": mask}


ROWS = [token_row([1, 2, 3][:n], [4, 5, 6, 7, 8, 9][: 2 * n]) for n in (1, 2, 3, 1, 3)]


def expert_model() -> Any:
    model = get_peft_model(language_model(), moelora_config(r=8, num_experts=4))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def counted(model: Any, **kwargs: Any) -> tuple[ClMoe, ExpertContext]:
    method, ctx = cl_moe(), ExpertContext(model, **kwargs)
    ctx.rows = ROWS
    method.prepare_model(ctx, model)
    method.train_end(ctx)
    return method, ctx


def test_experts_are_counted_over_tokens_without_padding() -> None:
    model = expert_model()
    method, ctx = counted(model)
    assert method._counts is not None
    tokens = sum(len(row["input_ids"]) for row in ctx.encode(ROWS))
    assert method._counts.sum(dim=1).tolist() == [2 * tokens] * len(method._layers)
    # By hand, a row at a time, from what reaches the first layer's router.
    name = method._layers[0]
    module = model.get_submodule(f"base_model.model.{name}")
    seen: list[torch.Tensor] = []
    handle = module.moelora_router["default"].register_forward_hook(lambda m, i, logits: seen.append(logits))
    by_hand = torch.zeros(4)
    for row in ctx.encode(ROWS):
        with torch.no_grad():
            model(input_ids=torch.tensor([row["input_ids"]]))
        for token in seen.pop()[0]:
            for expert in sorted(range(4), key=lambda i: -float(token[i]))[:2]:
                by_hand[expert] += 1
    handle.remove()
    assert method._counts[0].tolist() == by_hand.tolist()
    assert not module.moelora_router["default"]._forward_hooks


def test_two_ranks_count_what_one_counts() -> None:
    whole, _ = counted(expert_model())
    models = [expert_model() for _ in range(2)]

    def make(rank: int, size: int) -> ExpertContext:
        ctx = ExpertContext(models[rank], rank=rank, world_size=size)
        ctx.rows = ROWS
        return ctx

    def work(ctx: Any) -> torch.Tensor:
        method = cl_moe()
        method.prepare_model(ctx, ctx.model)
        method.train_end(ctx)
        assert method._counts is not None
        return method._counts

    for found in on_ranks(2, make, work):
        assert torch.equal(found, whole._counts)


@pytest.mark.parametrize("history", ["last", "union"])
def test_every_expert_is_blended_with_what_it_was(tmp_path: Path, history: str) -> None:
    model = expert_model()
    folder = tmp_path / "t1" / "adapter"
    model.base_model.new_task("default", 0.5)
    model.save_pretrained(str(folder))
    old = stored_adapter(folder)
    layers = sorted({name.split(".moelora_")[0] for name in old})
    sets = [{name: [2] for name in layers}, {name: [0, 1] for name in layers}]
    state = MethodState(meta={"sets": sets})
    method, ctx = cl_moe(history=history), ExpertContext(model, earlier=["t0", "t1"], state=state, folder=tmp_path)
    method.prepare_model(ctx, model)
    method._sets = {name: [1, 2] for name in layers}
    new = {name: tensor + 1 for name, tensor in ctx.weights().items()}
    kept = method.export(ctx, new)
    shares = torch.tensor([0.7, 0.7, 0.3 if history == "last" else 0.7, 0.7]).repeat_interleave(2)
    for name, tensor in kept.items():
        if "moelora_A" in name:
            assert torch.allclose(tensor, shares[:, None] * old[name] + (1 - shares)[:, None] * new[name]), name
        elif "moelora_B" in name:
            assert torch.allclose(tensor, shares * old[name] + (1 - shares) * new[name]), name
        else:
            assert torch.equal(tensor, new[name]), "routers and gates are those that were trained"
    # Blending factors is not blending what they add: 0.5 (2 + 4) x 0.5 (3 + 5) = 12, not 0.5 (6 + 20) = 13.
    assert (0.5 * 2 + 0.5 * 4) * (0.5 * 3 + 0.5 * 5) == 12


def test_more_own_experts_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match=r"--cl_moe_top_k is 5, allowed: at most the number of experts \(4\)"):
        cl_moe(top_k=5).prepare_model(ExpertContext(expert_model()), expert_model())
    ctx = ExpertContext(expert_model())
    cl_moe(top_k=4).prepare_model(ctx, ctx.model)
    assert "blended alike" in ctx.notices[0]


# --- routing and whole stages ----------------------------------------------------------------------------------------


def test_a_question_goes_to_the_task_of_the_nearest_centre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swift_cl.methods import cl_moe as module
    from swift_cl.methods._routing import RouteRequest

    tensors = {"centres/one": torch.tensor([[0.0, 0.0]]), "centres/two": torch.tensor([[4.0, 0.0], [0.0, 3.0]])}
    save_method_state(tmp_path / "stage" / "cl_state", "cl_moe", MethodState({**tensors, "counts": torch.zeros(1)}))
    router = make_router(cl_moe(), make_adapters(tmp_path / "adapters", ["one", "two"]), tmp_path / "stage")
    features = torch.tensor([[1.9, 0.1], [2.1, 0.0], [0.0, 2.9]])
    monkeypatch.setattr(module, "routed_features", lambda *args: features)
    request = RouteRequest(({"role": "user", "content": "?"},), {"one": None, "two": None})
    routes = router.route([request] * 3)
    assert [found.chosen for found in routes] == ["one", "two", "two"]
    assert routes[2].scores == pytest.approx({"one": 2.9, "two": 0.1})
    assert cl_moe(route="oracle").needs_task_id()


@pytest.mark.slow
def test_two_stages(tmp_path: Path) -> None:
    from tests.support.train import train_stage

    first, second = tmp_path / "1", tmp_path / "2"
    train_stage("cl_moe", "2022", first, max_steps=1)
    sft = train_stage("cl_moe", "2023", second, first, max_steps=1)
    before, kept = stored_adapter(first / "adapter"), stored_adapter(second / "adapter")
    phi = {name: weight.detach() for name, weight in sft.session.parameters.items()}
    for part in ("moelora_A", "moelora_B"):
        for name in (name for name in kept if part in name):
            experts = zip(*(t[name].unflatten("AB".index(part[-1]), (4, -1)).movedim("AB".index(part[-1]), 0)
                            for t in (before, kept, phi)), strict=True)  # fmt: skip
            for old, own, trained in experts:
                assert not torch.equal(own, trained), "an expert was not blended"
                assert not torch.equal(own, old)
                lam = [torch.allclose(own, share * old + (1 - share) * trained, atol=1e-6) for share in (0.3, 0.7)]
                assert any(lam)
    served = stored_adapter(second / "cl_state" / "served" / "2022")
    for name, tensor in served.items():
        assert torch.equal(tensor, before[name] if "moelora_task" in name else kept[name]), name
    state = load_method_state(second / "cl_state", "cl_moe")
    assert len(state.meta["sets"]) == 2
    assert {name for name in state.tensors if name.startswith("centres/")} == {"centres/2022", "centres/2023"}
    assert any(bool(kept[name].any()) for name in kept if "moelora_task" in name), "the task's gate learned nothing"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.1}, r"--cl_moe_beta is 1.1, allowed: a number in \[0, 1\]"),
        ({"gamma": 0.4}, r"--cl_moe_gamma is 0.4, allowed: a number in \[0.5, 1\]"),
        ({"top_k": 0}, "--cl_moe_top_k is 0, allowed: a whole number >= 1"),
        ({"count_rows": 0}, "--cl_moe_count_rows is 0, allowed: a whole number >= 1"),
        ({"centers": 0}, "--cl_moe_centers is 0, allowed: a whole number >= 1"),
        ({"route_batch": 0}, "--cl_moe_route_batch is 0, allowed: a whole number >= 1"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cl_moe(**settings)
