"""o_lora against hand-computed numbers (T1 to T6 of its specification), and its checks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.methods._adapter_history import HISTORY, truncated
from swift_cl.methods.o_lora import OLora, OLoraConfig, strongest
from tests.support.fake_context import FakeContext, FakeGradients
from tests.support.lora_pair import LoraPair

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
A_OLD = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
A_NEW = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])


def second_task(a: Tensor, span: Tensor, **settings: Any) -> tuple[OLora, FakeContext]:
    ctx = FakeContext(LoraPair(a, torch.zeros(2, len(a))), earlier=["t0"], state=MethodState({f"span/{A}": span}))
    method = OLora(OLoraConfig(**settings))
    method.train_begin(ctx)
    return method, ctx


def added(method: OLora, ctx: FakeContext, start: float = 0.0) -> dict[str, Tensor]:
    """What the method adds to gradients that are `start` everywhere."""
    grads = FakeGradients({name: torch.full_like(weight, start) for name, weight in ctx.weights().items()})
    method.gradients(ctx, grads)
    return {name: grads[name] - start for name in grads.names}


def test_t1_squared_form() -> None:
    method, ctx = second_task(A_NEW, A_OLD.T, lambda1=0.5)
    assert added(method, ctx)[A].tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]  # 0.5 x [[2, 4, 0], [0, 0, 0]]
    assert ctx.logged["o_lora_overlap"] == 5  # contracted over the wrong axis it would be 14
    assert ctx.logged["o_lora_penalty"] == 2.5


def test_t1_l1_form() -> None:
    method, ctx = second_task(A_NEW, A_OLD.T, lambda1=2.0, form="l1")
    assert added(method, ctx)[A].tolist() == [[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    assert ctx.logged["o_lora_overlap"] == 3


def test_t2_the_basis_form_sees_directions_and_not_lengths() -> None:
    def overlap(scale: float, form: str) -> float:
        method, ctx = second_task(A_NEW * scale, A_OLD.T, form=form)
        added(method, ctx)
        return ctx.logged["o_lora_overlap"]

    assert overlap(1, "basis") == pytest.approx(0.5)
    assert overlap(10, "basis") == pytest.approx(0.5)
    assert overlap(0.1, "squared") == pytest.approx(0.05)


def test_t3_a_direction_of_two_tasks_counts_once_in_the_basis_and_twice_in_the_square() -> None:
    twice = torch.cat([A_OLD[:1].T, A_OLD[:1].T], dim=1)
    for form, expected in (("basis", 0.5), ("squared", 2.0)):
        method, ctx = second_task(torch.tensor([[1.0, 1.0, 0.0]]), twice, form=form)
        added(method, ctx)
        assert ctx.logged["o_lora_overlap"] == pytest.approx(expected), form


@pytest.mark.parametrize("form", ["squared", "l1", "basis"])
def test_the_gradient_is_that_of_the_value(form: str) -> None:
    torch.manual_seed(3)
    a, span = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    method = OLora(OLoraConfig(form=form))
    span = torch.linalg.qr(span)[0][:, :2] if form == "basis" else span
    a.requires_grad_(True)
    value, slope = method.penalty(a, span)
    (expected,) = torch.autograd.grad(value, a)
    assert torch.allclose(slope, expected, atol=1e-12)


def test_lambda2_is_the_norm_and_not_its_square() -> None:
    method, ctx = second_task(
        torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[0.0], [0.0], [1.0]]), lambda1=0, lambda2=2
    )
    assert added(method, ctx)[A][0].tolist() == pytest.approx([1.2, 1.6, 0.0])
    assert ctx.logged["o_lora_penalty"] == pytest.approx(10.0, abs=1e-5)
    # B is zero here: its norm has no direction yet, and the gradient is 0 and not NaN.
    assert added(method, ctx)[B].tolist() == [[0.0], [0.0]]


def test_lambda2_pulls_b_too() -> None:
    """Norms 5 of A and 13 of B: 2 (5 + 13), and 2 B / 13."""
    method, ctx = second_task(
        torch.tensor([[3.0, 4.0, 0.0]]), torch.tensor([[0.0], [0.0], [1.0]]), lambda1=0, lambda2=2
    )
    with torch.no_grad():
        ctx.parameters[B].copy_(torch.tensor([[5.0], [12.0]]))
    assert added(method, ctx)[B].flatten().tolist() == pytest.approx([10 / 13, 24 / 13])
    assert ctx.logged["o_lora_penalty"] == pytest.approx(36.0, abs=1e-5)


@pytest.mark.parametrize(("form", "value", "part"), [("squared", 10.0, 1.0), ("l1", 6.0, 1.0), ("basis", 5 / 18, 0.5)])
def test_layers_are_summed_and_in_the_basis_form_averaged(form: str, value: float, part: float) -> None:
    """Twice the same layer, products (1, 2) and (0, 0) with the old rows: 5 + 5, 3 + 3, the mean of (5 / 9 + 0) / 2;
    each layer's gradient is that of one alone, or half of it."""
    a = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 3.0]])
    alone, one = second_task(a, A_OLD.T, form=form)
    model = nn.ModuleList([LoraPair(a, torch.zeros(2, 2)) for _ in range(2)])
    state = MethodState({f"span/{number}.{A}": A_OLD.T for number in range(2)})
    ctx = FakeContext(model, earlier=["t0"], state=state)
    method = OLora(OLoraConfig(form=form))
    method.train_begin(ctx)
    found, expected = added(method, ctx), added(alone, one)[A]
    assert ctx.logged["o_lora_overlap"] == pytest.approx(value)
    assert ctx.logged["o_lora_penalty"] == pytest.approx(0.5 * value)
    assert expected.any()
    assert all(torch.allclose(found[f"{number}.{A}"], part * expected) for number in range(2))


def test_t6_added_once_a_step_whatever_the_gradient_is() -> None:
    """The hook runs once per optimizer step on the reduced gradient, so nothing scales with accumulation."""
    method, ctx = second_task(A_NEW, A_OLD.T, lambda1=0.5)
    assert torch.allclose(added(method, ctx, start=7.0)[A], added(method, ctx)[A])


def test_first_task_touches_nothing() -> None:
    ctx = FakeContext(LoraPair(A_NEW, torch.zeros(2, 2)))
    method = OLora(OLoraConfig(lambda1=5, lambda2=5))
    method.train_begin(ctx)
    grads = FakeGradients({name: torch.ones_like(weight) for name, weight in ctx.weights().items()})
    method.gradients(ctx, grads)
    assert not grads.written
    assert not ctx.logged


def test_spans_grow_by_each_task_and_shrink_to_the_strongest_directions() -> None:
    ctx = FakeContext(LoraPair(A_OLD, torch.zeros(2, 2)))
    first = OLora(OLoraConfig()).end_task(ctx)
    assert first.tensors[f"span/{A}"].tolist() == A_OLD.T.tolist()
    ctx = FakeContext(LoraPair(A_NEW, torch.zeros(2, 2)), earlier=["t0"], state=first)
    second = OLora(OLoraConfig()).end_task(ctx)
    h = second.tensors[f"span/{A}"] @ second.tensors[f"span/{A}"].T
    assert torch.allclose(h, A_OLD.T @ A_OLD + A_NEW.T @ A_NEW)
    assert first.tensors[f"span/{A}"].shape == (3, 2), "the state of the stage before was changed"

    cut = OLora(OLoraConfig(basis_rank=2)).end_task(ctx)
    assert cut.tensors[f"span/{A}"].shape == (3, 2)
    assert "2 directions per layer keep" in ctx.notices[0]


def test_strongest_directions() -> None:
    span, share = strongest(torch.diag(torch.tensor([3.0, 4.0])), 1)
    assert (span @ span.T).tolist() == [[0.0, 0.0], [0.0, pytest.approx(16.0)]]
    assert share == pytest.approx(16 / 25)


def test_truncation_is_the_best_of_its_rank() -> None:
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    new_a, new_b, error = truncated(a, b, 1)
    assert (new_a.shape, new_b.shape) == ((1, 2), (3, 1))
    assert torch.allclose(new_b @ new_a, torch.tensor([[0.0, 0.0], [0.0, 4.0], [0.0, 0.0]]), atol=1e-6)
    assert error == pytest.approx(3 / 5)


def test_truncation_beyond_the_width_fills_with_zeros() -> None:
    a, b = torch.randn(4, 2), torch.randn(5, 4)
    new_a, new_b, error = truncated(a, b, 3)
    assert (new_a.shape, new_b.shape) == ((3, 2), (5, 3))
    assert torch.allclose(new_b @ new_a, b @ a, atol=1e-5)
    assert error < 1e-6


# --- with PEFT ---------------------------------------------------------------------------------------------------


def base_model() -> Any:
    model = nn.Sequential()
    layer = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(layer.weight)
    model.add_module("layer", layer)
    return model


def peft_model(rank: int = 1, alpha: int = 4, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base_model(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], **settings))


class PeftContext(FakeContext):
    """Names the parameters as the session does."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        from swift_cl.training.before import parameter_name

        assert self.model is not None
        return {parameter_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}


def set_pair(model: Any, a: list[float], b: list[float]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A.default" in name:
                parameter.copy_(torch.tensor([a]))
            if "lora_B.default" in name:
                parameter.copy_(torch.tensor(b)[:, None])


def save_stage(folder: Path, method: OLora, ctx: FakeContext, model: Any) -> None:
    """What `CLSft` writes at a stage's end."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model.save_pretrained(str(folder), selected_adapters=["default"])
    kept = method.export(ctx, {name: p.detach().clone() for name, p in ctx.parameters.items()})
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in kept.items()},
        folder / "adapter_model.safetensors",
    )
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(method.export_config(ctx, json.loads(config.read_text()))))


def two_stages(tmp_path: Path, alpha: int = 4, **settings: Any) -> tuple[Any, OLora, PeftContext]:
    model = peft_model()
    set_pair(model, [1.0, 0.0, 0.0], [2.0, 0.0])
    ctx, method = PeftContext(model), OLora(OLoraConfig())
    method.prepare_model(ctx, model)
    save_stage(tmp_path / "t0" / "adapter", method, ctx, model)
    state = method.end_task(ctx)
    model = peft_model(alpha=alpha)
    ctx = PeftContext(model, earlier=["t0"], state=state, folder=tmp_path)
    method = OLora(OLoraConfig(**settings))
    assert method.prepare_model(ctx, model) is model
    set_pair(model, [0.0, 1.0, 1.0], [0.0, 1.0])
    return model, method, ctx


def test_t4_history_and_new_pair_equal_the_combined_file(tmp_path: Path) -> None:
    from peft import PeftModel

    model, method, ctx = two_stages(tmp_path)
    x = torch.ones(1, 3)
    assert model(x)[0].tolist() == [8.0, 8.0]
    save_stage(tmp_path / "t1" / "adapter", method, ctx, model)
    config = json.loads((tmp_path / "t1" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 8)
    served: Any = PeftModel.from_pretrained(base_model(), str(tmp_path / "t1" / "adapter"))
    assert served(x)[0].tolist() == [8.0, 8.0]  # with alpha left at 4 it would be 4, 4


def test_a_new_pair_does_not_begin_on_top_of_an_old_one(tmp_path: Path) -> None:
    """Every stage has the run's seed, so PEFT gives each the same first A: here that of the first task."""
    first = peft_model()
    ctx, method = PeftContext(first), OLora(OLoraConfig())
    method.prepare_model(ctx, first)
    a = ctx.parameters[A].detach().clone()
    save_stage(tmp_path / "t0" / "adapter", method, ctx, first)
    begun = []
    for task in ("now", "now", "later"):
        model = peft_model()
        ctx = PeftContext(model, task=task, earlier=["t0"], folder=tmp_path)
        with torch.no_grad():
            ctx.parameters[A].copy_(a)
        OLora(OLoraConfig()).prepare_model(ctx, model)
        assert not ctx.parameters[B].any()
        begun.append(ctx.parameters[A].detach().clone())
    assert not torch.allclose(begun[0], a)
    assert torch.equal(begun[0], begun[1])
    assert not torch.allclose(begun[0], begun[2])


def test_another_alpha_is_folded_into_the_history(tmp_path: Path) -> None:
    model, method, ctx = two_stages(tmp_path, alpha=8)
    assert model(torch.ones(1, 3))[0].tolist() == [8.0, 16.0]
    kept = method.export(ctx, {name: p.detach() for name, p in ctx.parameters.items()})
    assert kept[B].tolist() == [[1.0, 0.0], [0.0, 1.0]]  # 2 x 4/8


def test_max_rank_cuts_the_kept_adapter(tmp_path: Path) -> None:
    _, method, ctx = two_stages(tmp_path, max_rank=1)
    kept = method.export(ctx, {name: p.detach() for name, p in ctx.parameters.items()})
    assert kept[A].shape == (1, 3)
    assert torch.allclose(kept[B] @ kept[A], torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), atol=1e-6)
    assert "cut to rank 1: a relative error of 0.577" in ctx.notices[0]  # sqrt(2 / 6)
    assert method.export_config(ctx, {"r": 1, "lora_alpha": 4}) == {"r": 1, "lora_alpha": 4}


def test_t5_history_is_active_and_frozen(tmp_path: Path) -> None:
    model, _, ctx = two_stages(tmp_path)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    assert not any(HISTORY in name for name in trained)
    assert list(ctx.parameters) == [A, B]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if HISTORY in name}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if HISTORY in name)
    assert len(before) == 2


def test_rank_stabilised_alpha_grows_by_the_root() -> None:
    method = OLora(OLoraConfig())
    method._history.ranks = (4, 16)
    assert method.export_config(FakeContext(), {"r": 4, "lora_alpha": 8, "use_rslora": True})["lora_alpha"] == 16


def test_what_cannot_be_summed_is_refused() -> None:
    model = peft_model(use_dora=True)
    with pytest.raises(UserError, match=r"these are trained too: layer\.lora_magnitude"):
        OLora(OLoraConfig()).prepare_model(PeftContext(model), model)
    model = peft_model(rank_pattern={"layer": 2})
    with pytest.raises(UserError, match="one rank and one alpha for all layers"):
        OLora(OLoraConfig()).prepare_model(PeftContext(model), model)
    model = peft_model(rank=2)
    with pytest.raises(UserError, match=r"--o_lora_max_rank is 1, allowed: 0, or at least --lora_rank \(2\)"):
        OLora(OLoraConfig(max_rank=1)).prepare_model(PeftContext(model), model)


def test_other_target_modules_are_refused() -> None:
    ctx = FakeContext(LoraPair(A_NEW, torch.zeros(2, 2)), earlier=["t0"], state=MethodState({f"span/x.{A}": A_OLD.T}))
    with pytest.raises(UserError, match="does not fit the trained parameters"):
        OLora(OLoraConfig()).train_begin(ctx)


@pytest.mark.parametrize(
    "settings", [{"lambda1": -1.0}, {"lambda2": float("nan")}, {"max_rank": -1}, {"basis_rank": -2}]
)
def test_values_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--o_lora_{next(iter(settings))} is"):
        OLoraConfig(**settings).validate()
