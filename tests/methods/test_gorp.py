"""gorp against hand-computed numbers (T1 to T6 of its specification), and what each form of it protects."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.methods._gradient_space import Sketch, grown
from swift_cl.methods._state import pack
from swift_cl.methods.gorp import Gorp, GorpConfig, without
from swift_cl.training.before import parameter_name
from tests.support.fake_context import FakeContext, FakeGradients
from tests.support.lora_pair import LoraPair

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
E1 = torch.tensor([[1.0], [0.0], [0.0]])


def second_task(space: Tensor, rank: int = 2, **settings: Any) -> tuple[Gorp, FakeContext]:
    """A method that has begun a second task without PEFT, as if `prepare_model` had read the state."""
    state = MethodState(pack(space={A: space}, energy={A: torch.ones(space.shape[1])}))
    ctx = FakeContext(LoraPair(torch.zeros(rank, len(space)), torch.zeros(2, rank)), earlier=["t0"], state=state)
    method = Gorp(GorpConfig(**settings))
    method._spaces, method._energies = {A: space}, {A: torch.ones(space.shape[1])}
    method.train_begin(ctx)
    return method, ctx


def test_t1_projection_on_the_input_side() -> None:
    method, ctx = second_task(E1, project="grad")
    grads = FakeGradients({A: torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]]), B: torch.ones(2, 2)})
    method.gradients(ctx, grads)
    assert grads[A].tolist() == [[0.0, 0.0, 4.0], [0.0, 1.0, 0.0]]  # on the rank side: [[0, 0, 0], [0, 1, 0]]
    assert grads.written == {A}


@pytest.mark.parametrize("project", ["forward", "none"])
def test_the_gradient_itself_is_left_alone_otherwise(project: str) -> None:
    method, ctx = second_task(E1, project=project)
    grads = FakeGradients({A: torch.ones(2, 3), B: torch.ones(2, 2)})
    method.gradients(ctx, grads)
    assert grads.written == set()


M = torch.diag(torch.tensor([3.0, 2.0, 1.0]))


@pytest.mark.parametrize(("eps", "kept"), [(0.9, 2), (0.95, 3), (0.6, 1)])
def test_t2_directions_of_the_first_task(eps: float, kept: int) -> None:
    """Energies 9, 4, 1: the direction that crosses the threshold counts (without it .9 would keep one)."""
    space, energy, share = grown(torch.zeros(3, 0), torch.zeros(0), M, eps, 64)
    assert space.shape == (3, kept)
    assert torch.allclose(space, torch.eye(3)[:, :kept], atol=1e-6)
    assert energy.tolist() == pytest.approx([9.0, 4.0, 1.0][:kept])
    assert share == 1.0


def test_t2_a_later_task_counts_what_is_explained_already() -> None:
    space, energy, _ = grown(E1, torch.tensor([5.0]), M, 0.9, 64)
    assert torch.allclose(space, torch.eye(3)[:, :2], atol=1e-6)
    assert energy.tolist() == pytest.approx([5.0, 4.0])
    same, _, _ = grown(torch.eye(3)[:, :2], torch.ones(2), M, 0.9, 64)
    assert same.shape == (3, 2)  # 13 of 14 are explained: no new direction


def test_directions_stay_orthonormal_and_keep_one_sign() -> None:
    torch.manual_seed(0)
    space, energy = torch.zeros(12, 0), torch.zeros(0)
    for _ in range(3):
        space, energy, _ = grown(space, energy, torch.randn(4, 12), 0.8, 64)
    assert torch.allclose(space.T @ space, torch.eye(space.shape[1]), atol=1e-6)
    largest = space.gather(0, space.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()


def test_the_limit_lets_the_weakest_directions_go() -> None:
    space, energy, share = grown(E1, torch.tensor([0.5]), M, 0.99, 2)
    assert torch.allclose(space, torch.eye(3)[:, 1:], atol=1e-6)
    assert energy.tolist() == pytest.approx([4.0, 1.0])
    assert share == pytest.approx(5 / 5.5)
    # A strong old direction stays, the weakest new one goes, and what is left keeps the order of learning.
    space, energy, share = grown(E1, torch.tensor([2.0]), M, 0.99, 2)
    assert torch.allclose(space, torch.eye(3)[:, :2], atol=1e-6)
    assert energy.tolist() == pytest.approx([2.0, 4.0])
    assert share == pytest.approx(6 / 7)


def test_rounding_at_the_threshold_takes_no_further_direction() -> None:
    """Singular values 3, 1, so exactly .9 of the energy lies in the first; as computed it is 8.999999999999998."""
    space, _, _ = grown(torch.zeros(2, 0), torch.zeros(0), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 0.9, 64)
    assert torch.allclose(space, torch.full((2, 1), 0.5**0.5), atol=1e-6)


def test_a_new_direction_is_orthogonal_to_an_old_one_that_rounding_has_left_too_long() -> None:
    """S = (1 + 1e-6) s, row = 100 s + e3: what is left of the row has -2e-4 s in it."""
    s = torch.tensor([[0.6], [0.8], [0.0]])
    row = 100 * s.T + torch.tensor([[0.0, 0.0, 1.0]])
    space, _, _ = grown(s * (1 + 1e-6), torch.ones(1), row, 0.99999, 64)
    assert torch.allclose(space, torch.cat([s, torch.eye(3)[:, 2:]], dim=1), atol=1e-5)


def test_t3_adams_first_step_goes_back_into_the_old_directions() -> None:
    """g has no part in S, its sign has: why projecting gradients does not protect."""
    s = torch.tensor([1.0, 2.0, 0.0]) / math.sqrt(5)
    g = torch.tensor([2.0, -1.0, 3.0])
    assert torch.allclose(without(g, s[:, None]), g)
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter], lr=1.0)
    parameter.grad = g
    optimizer.step()
    inside = float(-parameter.detach() @ s)
    assert inside == pytest.approx(-0.4472, abs=1e-3)
    assert inside**2 / 3 == pytest.approx(0.0667, abs=1e-3)


# --- with PEFT -------------------------------------------------------------------------------------------------------


class PeftContext(FakeContext):
    """Names the parameters as the session does."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        assert self.model is not None
        return {parameter_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}


def base_model(width: int) -> Any:
    model = nn.Sequential()
    layer = nn.Linear(width, 2, bias=False)
    nn.init.zeros_(layer.weight)
    model.add_module("layer", layer)
    return model


def peft_model(width: int, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base_model(width), LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"]))


def save_stage(folder: Path, method: Gorp, ctx: FakeContext, model: Any) -> None:
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


def later_task(folder: Path, space: Tensor, rank: int = 2, **settings: Any) -> tuple[Any, Gorp, PeftContext]:
    """A second task after a first one that learned nothing (its B is zero)."""
    torch.manual_seed(0)
    model = peft_model(len(space), rank)
    first = Gorp(GorpConfig())
    ctx = PeftContext(model)
    first.prepare_model(ctx, model)
    save_stage(folder / "t0" / "adapter", first, ctx, model)
    state = MethodState(pack(space={A: space}, energy={A: torch.ones(space.shape[1])}))
    model = peft_model(len(space), rank)
    ctx = PeftContext(model, earlier=["t0"], state=state, folder=folder)
    method = Gorp(GorpConfig(**settings))
    assert method.prepare_model(ctx, model) is model
    method.train_begin(ctx)
    return model, method, ctx


def set_pair(ctx: PeftContext, a: Tensor, b: Tensor) -> None:
    with torch.no_grad():
        ctx.parameters[A].copy_(a)
        ctx.parameters[B].copy_(b)


def test_t4_the_layer_uses_what_lies_outside(tmp_path: Path) -> None:
    model, _, ctx = later_task(tmp_path, E1, rank=1)
    set_pair(ctx, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [0.0]]))
    assert model(torch.ones(1, 3)).tolist() == [[5.0, 0.0]]


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_t5_the_gradient_through_the_layer_is_the_projected_one(tmp_path: Path, reentrant: bool | None) -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(2)
    space = torch.linalg.qr(torch.randn(6, 2))[0]
    x, a, b = torch.randn(5, 6), torch.randn(2, 6), torch.randn(2, 2)
    model, _, ctx = later_task(tmp_path, space)
    set_pair(ctx, a, b)
    x.requires_grad_(True)
    found = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
    found.square().sum().backward()
    plain = without(a, space).requires_grad_(True)
    ((x @ plain.T) @ b.T).square().sum().backward()
    assert plain.grad is not None
    assert ctx.parameters[A].grad is not None
    assert torch.allclose(ctx.parameters[A].grad, without(plain.grad, space), atol=1e-4, rtol=1e-5)


def disturbance(folder: Path, project: str) -> float:
    """How far 50 steps of AdamW with weight decay move the output for inputs in span(S), relative to these inputs."""
    torch.manual_seed(1)
    space = torch.linalg.qr(torch.randn(8, 2))[0]
    model, method, ctx = later_task(folder, space, rank=4, project=project)
    optimizer = torch.optim.AdamW(ctx.parameters.values(), lr=0.05, weight_decay=0.1)
    x, y = torch.randn(32, 8), torch.randn(32, 2)
    for _ in range(50):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        grads = FakeGradients({name: p.grad for name, p in ctx.parameters.items() if p.grad is not None})
        method.gradients(ctx, grads)
        for name, parameter in ctx.parameters.items():
            parameter.grad = grads[name]
        optimizer.step()
    probe = space.T
    return float((model(probe).norm() / probe.norm()).detach())


def test_t3_only_the_default_form_protects_whatever_the_optimizer_does(tmp_path: Path) -> None:
    moved = {project: disturbance(tmp_path / project, project) for project in ("none", "grad", "forward")}
    assert moved["forward"] < 1e-6
    assert moved["grad"] > 0.1
    assert moved["none"] > 0.1


def test_t6_the_exported_adapter_needs_no_hook(tmp_path: Path) -> None:
    from peft import PeftModel

    torch.manual_seed(3)
    space = torch.linalg.qr(torch.randn(6, 2))[0]
    model, method, ctx = later_task(tmp_path, space)
    set_pair(ctx, torch.randn(2, 6), torch.randn(2, 2))
    x = torch.randn(4, 6)
    expected = model(x)
    save_stage(tmp_path / "t1" / "adapter", method, ctx, model)
    served: Any = PeftModel.from_pretrained(base_model(6), str(tmp_path / "t1" / "adapter"))
    assert torch.allclose(served(x), expected, atol=1e-5)
    assert served.peft_config["default"].r == 4  # with the first task's pair


def test_hist_rank_cuts_the_kept_adapter(tmp_path: Path) -> None:
    """The first task learned nothing, so the best approximation of rank 1 is the new pair: B (A - A S S')."""
    _, method, ctx = later_task(tmp_path, E1, rank=1, hist_rank=1)
    set_pair(ctx, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [0.0]]))
    kept = method.export(ctx, {name: p.detach().clone() for name, p in ctx.parameters.items()})
    assert kept[A].shape == (1, 3)
    assert torch.allclose(kept[B] @ kept[A], torch.tensor([[0.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), atol=1e-5)


def test_t6_without_the_state_of_the_stage_before_it_does_not_start(tmp_path: Path) -> None:
    from swift_cl.io import load_method_state

    class Reading(PeftContext):
        def previous_state(self) -> MethodState:
            return load_method_state(self.earlier[-1].state_dir, "gorp")

    model = peft_model(3, 1)
    first = Gorp(GorpConfig())
    ctx = PeftContext(model)
    first.prepare_model(ctx, model)
    save_stage(tmp_path / "t0" / "adapter", first, ctx, model)
    model = peft_model(3, 1)
    with pytest.raises(UserError, match=r"gorp\.json: the state of method 'gorp' is missing"):
        Gorp(GorpConfig()).prepare_model(Reading(model, earlier=["t0"], folder=tmp_path), model)


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_the_moment_is_adams_and_makes_the_space() -> None:
    ctx = FakeContext(LoraPair(torch.zeros(1, 3), torch.zeros(2, 1)))
    method = Gorp(GorpConfig())
    method.train_begin(ctx)
    parameter = nn.Parameter(torch.zeros(1, 3))
    adam = torch.optim.Adam([parameter])
    for g in ([[1.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]], [[0.0, 2.0, 0.0]]):
        method.gradients(ctx, FakeGradients({A: torch.tensor(g), B: torch.zeros(2, 1)}))
        parameter.grad = torch.tensor(g)
        adam.step()
    moment = adam.state[parameter]["exp_avg"]
    assert torch.allclose(method._moments[A], moment)
    state = method.end_task(ctx)
    assert torch.allclose(state.tensors[f"space/{A}"].T, moment / moment.norm())
    assert state.tensors[f"energy/{A}"].item() == pytest.approx(float(moment.square().sum()))


@pytest.mark.parametrize(("eps", "max_rank", "kept"), [(0.6, 64, 1), (0.9, 64, 2), (0.95, 64, 3), (0.95, 2, 2)])
def test_the_settings_say_how_much_is_remembered(eps: float, max_rank: int, kept: int) -> None:
    """Energies 9, 4, 1 (times .1 squared): a limit of two directions keeps 13 of 14 of them."""
    ctx = FakeContext(LoraPair(torch.zeros(3, 3), torch.zeros(2, 3)))
    method = Gorp(GorpConfig(eps=eps, max_rank=max_rank))
    method.train_begin(ctx)
    method.gradients(ctx, FakeGradients({A: M, B: torch.zeros(2, 3)}))
    assert torch.allclose(method.end_task(ctx).tensors[f"space/{A}"], torch.eye(3)[:, :kept], atol=1e-6)
    assert ctx.notices == (["2 directions per layer keep 0.929 or more of the energy"] if max_rank == 2 else [])


def test_the_paper_remembers_the_gradient_that_adam_saw() -> None:
    method, ctx = second_task(E1, project="grad")
    method.gradients(ctx, FakeGradients({A: torch.tensor([[3.0, 0.0, 4.0], [0.0, 1.0, 0.0]]), B: torch.ones(2, 2)}))
    assert torch.allclose(method._moments[A], torch.tensor([[0.0, 0.0, 0.4], [0.0, 0.1, 0.0]]))


def test_the_share_of_a_in_old_directions_is_logged() -> None:
    """9 of 9 + 16."""
    method, ctx = second_task(E1)
    with torch.no_grad():
        ctx.parameters[A].copy_(torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]]))
    method.gradients(ctx, FakeGradients({A: torch.ones(2, 3), B: torch.ones(2, 2)}))
    assert ctx.logged == {"gorp_inside": pytest.approx(0.36)}


def test_an_old_direction_competes_with_the_energy_it_had() -> None:
    """1 against the .01 of the new one."""
    method, ctx = second_task(E1, max_rank=1)
    method.gradients(ctx, FakeGradients({A: torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), B: torch.zeros(2, 2)}))
    tensors = method.end_task(ctx).tensors
    assert torch.allclose(tensors[f"space/{A}"], E1)
    assert tensors[f"energy/{A}"].tolist() == [1.0]


def test_a_later_task_adds_to_the_space_and_leaves_the_stored_one_alone() -> None:
    method, ctx = second_task(E1)
    method.gradients(ctx, FakeGradients({A: torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), B: torch.zeros(2, 2)}))
    space = method.end_task(ctx).tensors[f"space/{A}"]
    assert torch.allclose(space, torch.eye(3)[:, :2], atol=1e-6)
    assert method._spaces[A].shape == (3, 1)


def test_a_sketch_keeps_its_bound_and_small_ones_are_exact() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 10) * torch.linspace(5, 0.1, 10)
    sketch = Sketch(8, 10)
    for part in rows.split(3):
        sketch.add(part)
    found = sketch.rows()
    assert found.shape[0] <= 8
    apart = torch.linalg.eigvalsh(rows.T.double() @ rows.double() - found.T.double() @ found.double())
    assert apart.min() > -1e-3
    assert apart.max() <= 2 * rows.square().sum() / 8
    exact = Sketch(8, 10)
    exact.add(rows[:5])
    assert torch.equal(exact.rows(), rows[:5])


def test_a_full_sketch_takes_the_cut_value_from_every_direction() -> None:
    """Squares 9, 4, 1, 1: half of the size are 2, so the second one, 4, is taken from all; 5 are left in e1, + 16."""
    sketch = Sketch(4, 4)
    for row in torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0])):
        sketch.add(row[None])
    sketch.add(torch.tensor([[4.0, 0.0, 0.0, 0.0]]))
    found = sketch.rows()
    assert len(found) == 2
    assert torch.allclose(found.T @ found, torch.diag(torch.tensor([21.0, 0.0, 0.0, 0.0])), atol=1e-5)


def test_a_sketch_of_fewer_directions_than_half_its_size_loses_nothing() -> None:
    sketch = Sketch(8, 2)
    for number in range(20):
        sketch.add(torch.eye(2)[number % 2 :][:1] * (1 + number % 2))
    found = sketch.rows()
    assert len(found) <= 8
    assert torch.allclose(found.T @ found, torch.diag(torch.tensor([10.0, 40.0])), atol=1e-4)


def test_a_sketch_sees_the_whole_task_and_the_moment_its_end() -> None:
    found = {}
    for kind in ("moment", "sketch"):
        ctx = FakeContext(LoraPair(torch.zeros(1, 3), torch.zeros(2, 1)))
        method = Gorp(GorpConfig(space=kind, eps=0.8))
        method.train_begin(ctx)
        for step in range(60):
            g = torch.tensor([[1.0, 0.0, 0.0]] if step < 30 else [[0.0, 1.0, 0.0]])
            method.gradients(ctx, FakeGradients({A: g, B: torch.zeros(2, 1)}))
        found[kind] = method.end_task(ctx).tensors[f"space/{A}"].shape[1]
    assert found == {"moment": 1, "sketch": 2}


@pytest.mark.parametrize("kind", ["moment", "sketch"])
def test_checkpoint_brings_back_what_was_seen(kind: str) -> None:
    ctx = FakeContext(LoraPair(torch.zeros(1, 3), torch.zeros(2, 1)))
    one, two = Gorp(GorpConfig(space=kind)), Gorp(GorpConfig(space=kind))
    one.train_begin(ctx)
    two.train_begin(ctx)
    one.gradients(ctx, FakeGradients({A: torch.tensor([[1.0, 2.0, 3.0]]), B: torch.zeros(2, 1)}))
    two.restore_checkpoint(ctx, one.checkpoint_state(ctx))
    for method in (one, two):
        method.gradients(ctx, FakeGradients({A: torch.tensor([[0.0, 1.0, 0.0]]), B: torch.zeros(2, 1)}))
    a, b = one.end_task(ctx).tensors, two.end_task(ctx).tensors
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = Gorp(GorpConfig(space="sketch" if kind == "moment" else "moment"))
    other.train_begin(ctx)
    with pytest.raises(UserError, match=f"but the checkpoint was trained with '{kind}'"):
        other.restore_checkpoint(ctx, one.checkpoint_state(ctx))


def test_no_free_direction_is_refused() -> None:
    with pytest.raises(UserError, match=r"no free directions are left for layer\.lora_A\.weight: 3 of 3"):
        second_task(torch.eye(3))


def test_other_target_modules_are_refused() -> None:
    ctx = FakeContext(LoraPair(torch.zeros(2, 3), torch.zeros(2, 2)), earlier=["t0"])
    method = Gorp(GorpConfig())
    method._spaces = {f"x.{A}": E1}
    with pytest.raises(UserError, match="does not fit the trained parameters"):
        method.train_begin(ctx)


@pytest.mark.parametrize("settings", [{"eps": 1.0}, {"eps": 0.0}, {"max_rank": 0}, {"hist_rank": -1}])
def test_values_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--gorp_{next(iter(settings))} is"):
        GorpConfig(**settings).validate()
