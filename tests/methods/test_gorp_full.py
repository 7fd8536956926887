"""gorp's full-rank layers against numbers worked out by hand, and through ms-swift: chained, resumed, served."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift_cl.errors import UserError
from swift_cl.methods._adapters import AdapterSwitch
from swift_cl.methods._full_rank import (
    Directions,
    FullRankLayer,
    Moments,
    compact,
    scaled_alpha,
    top_directions,
    widened_span,
)
from swift_cl.methods._full_rank_part import FullRankPart
from swift_cl.methods.gorp import Gorp, GorpConfig
from swift_cl.stages import load_stage
from swift_cl.training.arguments import check_support
from tests.methods.test_gorp import PeftContext, save_stage
from tests.support.chains import STAGES, run_chain
from tests.support.fake_context import FakeGradients
from tests.support.train import MODEL, TASKS, adapter, contradicting_rows, train_stage

E1 = torch.tensor([[1.0], [0.0], [0.0]])


def layer(out: int, width: int, rank: int, gap: int = 10, space: Tensor | None = None, scale: float = 1.0) -> Any:
    return FullRankLayer("x", nn.Parameter(torch.zeros(out, width)), rank, gap, scale, space)


def step(one: FullRankLayer, gradient: Tensor, rate: float = 0.1) -> Tensor:
    rows = one.see(gradient, 0, lambda value: value)
    one.move(rate)
    return rows


# --- one step --------------------------------------------------------------------------------------------------------


def test_the_step_is_taken_in_the_gradients_largest_direction() -> None:
    """G = [[0, 4], [3, 0]]: U = e1, V = e2, P = 4 (up to sign), Adam's first step is 1: W[0, 1] moves by -lr scale."""
    one = layer(2, 2, rank=1, scale=0.5)
    rows = step(one, torch.tensor([[0.0, 4.0], [3.0, 0.0]]))
    assert torch.allclose(one.delta, torch.tensor([[0.0, -0.05], [0.0, 0.0]]), atol=1e-6)
    assert torch.allclose(rows.abs(), torch.tensor([[0.0, 4.0]]), atol=1e-5)


def test_the_projection_comes_first() -> None:
    """G = diag(3, 2, 1), S = e1: diag(0, 2, 1) is left; choosing directions first would find e1, and P 0."""
    one = layer(3, 3, rank=1, space=E1)
    step(one, torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    assert torch.allclose(one.delta, torch.diag(torch.tensor([0.0, -0.1, 0.0])), atol=1e-6)


def test_rounding_beside_the_diagonal_makes_no_step() -> None:
    """In its own directions P is diag(5, 1): N is the identity, and U N V' is orthogonal with two equal values."""
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    one = layer(2, 2, rank=2)
    step(one, turn @ torch.diag(torch.tensor([5.0, 1.0])) @ turn.T)
    assert torch.allclose(one.delta, -0.1 * torch.eye(2), atol=1e-6)


def test_between_changes_it_is_adam_in_fixed_directions() -> None:
    """Against torch's Adam on P, five steps within one gap."""
    torch.manual_seed(0)
    one = layer(6, 5, rank=3)
    own = nn.Parameter(torch.zeros(3, 3))
    adam = torch.optim.Adam([own], lr=0.1)
    for _ in range(5):
        gradient = torch.randn(6, 5)
        step(one, gradient)
        assert one.directions is not None
        own.grad = one.directions.left.T @ gradient @ one.directions.right
        own.grad[own.grad.abs() < 1e-5 * own.grad.abs().max()] = 0
        adam.step()
        assert torch.allclose(one.delta, one.directions.left @ own @ one.directions.right.T, atol=1e-5)


# --- a change of directions ------------------------------------------------------------------------------------------


def test_moments_go_along() -> None:
    """U from e1, e2 to (.6, .8), (-.8, .6); V turns e1 into e2: m = [[2, 0], [0, 1]] -> [[0, 1.2], [.8, 0]] ..."""
    old = Directions(torch.eye(2), torch.eye(2))
    new = Directions(torch.tensor([[0.6, -0.8], [0.8, 0.6]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    moments = Moments(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 0.0], [1.0, 1.0]]), 7)
    moments.carry(old, new)
    # R = [[.6, .8], [-.8, .6]], T = [[0, 1], [1, 0]]
    assert torch.allclose(moments.first, torch.tensor([[0.8, 1.2], [0.6, -1.6]]))
    # (R o R) v = [[.36 4 + .64 1, .64], [.64 4 + .36 1, .36]], then its columns change places
    assert torch.allclose(moments.second, torch.tensor([[0.64, 2.08], [0.36, 2.92]]))
    assert moments.steps == 7


@pytest.mark.parametrize(("second", "moment"), [(torch.tensor([1.0, 3.0]), 0.3), (torch.tensor([2.0, 1.0]), 0.56)])
def test_a_step_in_other_directions_takes_the_moments_along(second: Tensor, moment: float) -> None:
    """diag(4, 1) leaves m = .4 in e1. Then e2: nothing of it, .1 x 3. Or e1 again: .9 x .4 + .1 x 2."""
    one = layer(2, 2, rank=1, gap=1)
    step(one, torch.diag(torch.tensor([4.0, 1.0])))
    step(one, torch.diag(second))
    assert one.moments is not None
    assert one.moments.first.item() == pytest.approx(moment, abs=1e-6)


def largest_step(reset: bool) -> float:
    """The largest entry of N in the step right after a change, over 20 changes under noisy gradients."""
    torch.manual_seed(1)
    drift = torch.randn(32, 16)
    one = layer(32, 16, rank=8, gap=10)
    largest = 0.0
    for number in range(210):
        if reset and number % 10 == 0 and one.moments:
            one.moments.second = torch.zeros_like(one.moments.second)
        one.see(drift + 2 * torch.randn(32, 16), 0, lambda value: value)
        assert one._step is not None
        if number and number % 10 == 0:
            largest = max(largest, float(one._step.abs().max()))
        one.move(1e-3)
    return largest


def test_a_second_moment_that_is_reset_makes_steps_of_any_size() -> None:
    """P is diagonal right after a change: beside the diagonal, m would be divided by 0 + eps."""
    assert largest_step(reset=False) < 4
    assert largest_step(reset=True) > 1e5


def test_directions_of_a_large_matrix_are_found_too() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.tensor([9.0, 7.0, 5.0]), torch.full((597,), 0.1)])
    left, right = torch.linalg.qr(torch.randn(700, 600))[0], torch.linalg.qr(torch.randn(600, 600))[0]
    state = torch.get_rng_state()
    found = top_directions(left * values @ right.T, None, 3, "key")
    assert torch.equal(state, torch.get_rng_state()), "training's random numbers"
    assert torch.allclose((found.left.T @ left[:, :3]).abs(), torch.eye(3), atol=1e-3)
    assert torch.allclose((found.right.T @ right[:, :3]).abs(), torch.eye(3), atol=1e-3)


def test_no_direction_is_made_up_where_the_gradient_has_none() -> None:
    """Rank 1 left of a gradient that lies in S otherwise: the second column would be any vector, e1 among them."""
    found = top_directions(torch.diag(torch.tensor([0.0, 2.0, 0.0])), E1, 2)
    assert torch.allclose(found.right.abs(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), atol=1e-6)
    assert not top_directions(torch.zeros(3, 3), E1, 2).right.any()


# --- over many steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "width"), [(25, 20), (60, 12)])
def test_old_directions_are_never_touched_and_the_pair_is_the_matrix(steps: int, width: int) -> None:
    torch.manual_seed(2)
    space = torch.linalg.qr(torch.randn(width, 3))[0]
    one = layer(16, width, rank=2, gap=5, space=space)
    for _ in range(steps):
        step(one, torch.randn(16, width))
    assert one.delta.norm() > 0.5
    assert (one.delta @ space).norm() / one.delta.norm() < 1e-5
    a, b = one.pair()
    assert len(a) == min(2 * math.ceil(steps / 5), 16, width - 3)
    assert torch.allclose(b @ a, one.delta, atol=1e-5)


def test_a_pair_is_never_wider_than_the_matrix() -> None:
    torch.manual_seed(0)
    for out, width in ((4, 7), (7, 4)):
        a, b = torch.randn(9, width), torch.randn(out, 9)
        one, other = compact(a, b)
        assert len(one) == 4
        assert torch.allclose(other @ one, b @ a, atol=1e-5)
    span = widened_span(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
    assert torch.allclose(span.abs(), torch.eye(4)[:, :3])


def test_the_moment_has_the_singular_values_of_the_whole_one() -> None:
    torch.manual_seed(0)
    one = layer(6, 5, rank=2)
    step(one, torch.randn(6, 5))
    assert one.directions is not None
    assert one.moments is not None
    whole = one.directions.left @ one.moments.first @ one.directions.right.T
    assert torch.allclose(torch.linalg.svdvals(one.moment()), torch.linalg.svdvals(whole)[:2], atol=1e-6)


# --- with PEFT -------------------------------------------------------------------------------------------------------


def two_layers() -> Any:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 4, bias=False))


def with_lora() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(6)
    return get_peft_model(two_layers(), LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))


SETTINGS = {"full_modules": "^0$", "full_rank": 2, "full_gap": 3, "full_lr": 0.05}


def train_task(folder: Path, earlier: list[str], state: Any, steps: int = 8) -> tuple[Any, Gorp, PeftContext]:
    """A task of one method on the two layers, the first of them in full rank; its stage is written."""
    model = with_lora()
    task = f"t{len(earlier)}"
    ctx = PeftContext(model, task=task, earlier=earlier, state=state, folder=folder)
    method = Gorp(GorpConfig(**SETTINGS))
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    torch.manual_seed(len(earlier))
    x, y = torch.randn(16, 6), torch.randn(16, 4)
    optimizer = torch.optim.AdamW(ctx.parameters.values(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        method.gradients(ctx, FakeGradients({n: p.grad for n, p in ctx.parameters.items() if p.grad is not None}))
        optimizer.step()
        method.after_step(ctx)
    save_stage(folder / task / "adapter", method, ctx, model)
    return model, method, ctx


def test_two_tasks_are_kept_in_one_lora_file(tmp_path: Path) -> None:
    from peft import PeftModel

    model, first, ctx = train_task(tmp_path, [], None)
    before = {name: p.clone() for name, p in with_lora().named_parameters()}
    for name in ("0.lora_A.weight", "0.lora_B.weight"):
        assert torch.equal(
            ctx.parameters[name], before["base_model.model." + name.replace(".weight", ".default.weight")]
        )
    delta = ctx.parameters["0.gorp_full"].detach().clone()
    assert delta.norm() > 0.1
    x = torch.randn(5, 6)
    expected = model(x)
    served: Any = PeftModel.from_pretrained(two_layers(), str(tmp_path / "t0" / "adapter"))
    assert torch.allclose(served(x), expected, atol=1e-5)
    config = json.loads((tmp_path / "t0" / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^0": 6}
    assert config["alpha_pattern"] == {"^0": 18.0}, "scaling 3 as everywhere"
    assert config["r"] == 2

    state = first.end_task(ctx)
    assert {"space/0.gorp_full", "space/1.lora_A.weight"} <= state.tensors.keys()
    assert "space/0.lora_A.weight" not in state.tensors
    model, _, ctx = train_task(tmp_path, ["t0"], state)
    second = ctx.parameters["0.gorp_full"].detach()
    space = state.tensors["space/0.gorp_full"]
    assert float((second @ space).norm() / second.norm()) < 1e-5
    served = PeftModel.from_pretrained(two_layers(), str(tmp_path / "t1" / "adapter"))
    assert torch.allclose(served(x), model(x), atol=1e-4)
    whole = served.base_model.model[0].get_delta_weight("default")
    assert torch.allclose(whole, delta + second, atol=1e-4)


def begun(later: bool = False, **settings: Any) -> tuple[Gorp, PeftContext]:
    """A method before its first step; of a later task, everything learned before lies in e1."""
    model = with_lora()
    ctx, method = PeftContext(model), Gorp(GorpConfig(**{**SETTINGS, **settings}))
    method.prepare_model(ctx, model)
    if later:
        e1 = torch.eye(6)[:, :1]
        ctx = PeftContext(model, earlier=["t0"])
        method._spaces = dict.fromkeys(("0.gorp_full", "1.lora_A.weight"), e1)
    method.train_begin(ctx)
    return method, ctx


def one_step(method: Gorp, ctx: PeftContext) -> Tensor:
    """What one step along diag(6, 5, 4, 3, 2, 1) makes of the matrix: its diagonal."""
    gradients = {name: torch.zeros_like(parameter) for name, parameter in ctx.parameters.items()}
    gradients["0.gorp_full"] = torch.diag(torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    method.gradients(ctx, FakeGradients(gradients))
    method.after_step(ctx)
    delta = ctx.parameters["0.gorp_full"].detach()
    assert torch.allclose(delta, torch.diag(delta.diagonal()), atol=1e-7)
    return delta.diagonal()


def test_a_step_is_as_long_as_rate_scale_and_schedule_say() -> None:
    """Adam's first step is 1 in each of the two directions: .05 x .5 x .4."""
    method, ctx = begun(full_scale=0.5)
    ctx.schedule = 0.4
    assert one_step(method, ctx).tolist() == pytest.approx([-0.01, -0.01, 0, 0, 0, 0], abs=1e-7)


@pytest.mark.parametrize(("project", "moved"), [("forward", [1, 2]), ("grad", [1, 2]), ("none", [0, 1])])
def test_only_none_lets_a_layer_use_old_directions(project: str, moved: list[int]) -> None:
    method, ctx = begun(later=True, project=project)
    assert one_step(method, ctx).nonzero().flatten().tolist() == moved


def test_a_sketch_remembers_the_directions_of_a_layers_steps() -> None:
    """Of diag(6, 5, ...) in two directions, 36 and 25: the first alone is .59 of that."""
    method, ctx = begun(space="sketch")
    one_step(method, ctx)
    tensors = method.end_task(ctx).tensors
    assert torch.allclose(tensors["space/0.gorp_full"], torch.eye(6)[:, :2], atol=1e-6)
    assert tensors["energy/0.gorp_full"].tolist() == pytest.approx([36.0, 25.0], rel=1e-5)


def test_a_layers_pairs_add_up_whatever_their_scalings() -> None:
    """The matrix moved by -.05 at [0, 1]; the history adds 1 there, scaled by 6, where the new scaling is 3."""
    one = layer(2, 2, rank=1, scale=0.5)
    step(one, torch.tensor([[0.0, 4.0], [3.0, 0.0]]))
    part = FullRankPart("x", 1, 10, 0.5, 0.1)
    part.layers, part._scaling = {"x": one}, 3.0
    history = {"x.lora_A.weight": torch.tensor([[0.0, 1.0]]), "x.lora_B.weight": torch.tensor([[1.0], [0.0]])}
    kept = part.pairs(history, 2.0)
    product = 3 * kept["x.lora_B.weight"] @ kept["x.lora_A.weight"]
    assert torch.allclose(product, torch.tensor([[0.0, 5.95], [0.0, 0.0]]), atol=1e-5)


def test_alpha_keeps_the_scaling() -> None:
    """3 x 16, or where alpha is divided by the root of the rank, 3 x 4."""
    assert (scaled_alpha(3.0, 16, False), scaled_alpha(3.0, 16, True)) == (48.0, 12.0)


def test_without_its_adapter_a_layer_is_the_base_models() -> None:
    method, ctx = begun()
    one_step(method, ctx)
    model: Any = ctx.model
    x = torch.randn(3, 6)
    base = two_layers()(x)
    assert not torch.allclose(model(x), base)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    with AdapterSwitch(model).active():
        assert torch.equal(model(x), base)


def test_the_pattern_is_found_anywhere_in_a_name() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(two_layers()), LoraConfig(target_modules=["0.0", "0.1"]))
    part = FullRankPart("1$", 2, 10, 1.0, 0.1)
    part.attach(model)
    assert list(part.layers) == ["0.1"]


def test_a_checkpoint_continues_as_if_nothing_had_been(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(6, 6) for _ in range(9)]
    whole, stopped = layer(6, 6, 2, gap=3), layer(6, 6, 2, gap=3)
    for gradient in gradients[:4]:
        step(whole, gradient)
    assert whole.moments is not None
    stopped.restore(whole.tensors(), whole.moments.steps)
    for gradient in gradients[4:]:
        step(whole, gradient)
        step(stopped, gradient)
    assert torch.equal(whole.delta, stopped.delta)
    assert torch.equal(whole.span, stopped.span)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"full_modules": "("}, "--gorp_full_modules is '(', allowed: a regular expression (missing )"),
        ({"full_rank": 4}, "--gorp_full_rank is 4, allowed: 8, because only --gorp_full_modules uses it"),
        ({"full_modules": "x", "full_rank": 0}, "--gorp_full_rank is 0, allowed: 1 or more"),
        ({"full_modules": "x", "full_gap": 0}, "--gorp_full_gap is 0, allowed: 1 or more"),
        ({"full_modules": "x", "full_scale": 0.0}, "--gorp_full_scale is 0.0, allowed: a number > 0"),
        ({"full_modules": "x", "full_lr": math.inf}, "--gorp_full_lr is inf, allowed: a number > 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        GorpConfig(**settings).validate()


def test_layers_that_do_not_exist_are_refused() -> None:
    model = with_lora()
    method = Gorp(GorpConfig(full_modules="gate_proj"))
    with pytest.raises(UserError, match=r"^--gorp_full_modules 'gate_proj' matches none of the 2 layers with a LoRA"):
        method.prepare_model(PeftContext(model), model)


def test_deepspeed_is_refused() -> None:
    from types import SimpleNamespace

    args = SimpleNamespace(tuner_type="lora", deepspeed={"zero_optimization": {"stage": 2}})
    with pytest.raises(
        UserError, match="--deepspeed with ZeRO stage 2 does not work with method 'gorp', allowed: none"
    ):
        check_support(args, Gorp(GorpConfig(full_modules="x")))


# --- through ms-swift ------------------------------------------------------------------------------------------------

FULL = {
    "gorp_full_modules": "gate_proj", "gorp_full_rank": 3, "gorp_full_gap": 2, "gorp_full_lr": 1e-3,
}  # fmt: skip


def products(stage: Path) -> Iterator[tuple[str, Tensor]]:
    """(layer, what its pair adds to the weight)."""
    tensors = adapter(stage)
    config = json.loads((load_stage(stage).weights_dir / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    for name, a in tensors.items():
        if ".lora_A." in name:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank, alpha = config["rank_pattern"].get(f"^{path}"), config["alpha_pattern"].get(f"^{path}")
            assert (rank or config["r"]) == len(a)
            assert rank is None or alpha / rank == pytest.approx(scaling)
            yield path, scaling * tensors[name.replace(".lora_A.", ".lora_B.")] @ a


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(first, second, their `CLSft`)."""
    folder = tmp_path_factory.mktemp("full_rank")
    first, second = folder / "1", folder / "2"
    one = train_stage("gorp", TASKS[0], first, **FULL)
    return first, second, (one, train_stage("gorp", TASKS[1], second, first, **FULL))


@pytest.mark.slow
def test_a_stage_keeps_the_matrices_of_all_tasks(stages: Any) -> None:
    first, second, (_, sft) = stages
    one, two = dict(products(first)), dict(products(second))
    own = {
        name.removeprefix("base_model.model."): p
        for name, p in sft.trainer.model.named_parameters()
        if "gorp_full" in name
    }
    assert len(own) == 4, "a layer of the tiny model each"
    for path in one:
        if path.endswith("gate_proj"):
            delta = own[f"{path}.gorp_full"].detach()
            assert one[path].norm() > 0
            assert delta.norm() > 0
            assert torch.allclose(two[path], one[path] + delta, atol=1e-6)
    ranks = {len(t) for name, t in adapter(second).items() if "lora_A" in name}
    assert ranks == {4 + 4, 2 * 3 + 2 * 3}, "each task a LoRA of 4; two times three directions"


@pytest.mark.slow
def test_the_kept_adapter_answers_as_the_stage_did(stages: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    *folders, (sft, _) = stages
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for folder in folders:
        stage = load_stage(folder)
        assert stage.probe is not None
        served = PeftModel.from_pretrained(base, str(stage.weights_dir)).eval()
        text = tokenizer.apply_chat_template(stage.probe["messages"], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = served(input_ids=ids).logits[0, -1]
            if folder == folders[0]:
                assert torch.allclose(logits, sft.trainer.model.eval()(input_ids=ids).logits[0, -1], atol=1e-4)
        served.unload()
        values, tokens = torch.log_softmax(logits, -1).topk(5)
        found = {tokenizer.decode(token): value for token, value in zip(tokens.tolist(), values.tolist(), strict=True)}
        assert found == pytest.approx(stage.probe["logprobs"], abs=1e-3)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(stages: Any, tmp_path: Path) -> None:
    first, second, _ = stages
    copy = tmp_path / "2"
    shutil.copytree(second, copy, symlinks=True)
    for name in ("stage.json", "adapter", "cl_state", "last-checkpoint", "checkpoint-4"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    train_stage("gorp", TASKS[1], copy, first, **FULL)
    a, b = adapter(second), adapter(copy)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SWIFT_CL_DISTRIBUTED") != "all", reason="SWIFT_CL_DISTRIBUTED=all runs it")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    contradicting_rows(tmp_path)
    for name, processes, batch in (("one", 1, 4), ("two", 2, 2)):
        run_chain(tmp_path / name, ["gorp"], processes, batch, FULL)
    one, two, start = (
        dict(products(tmp_path / run / "runs" / "gorp" / stage))
        for run, stage in (("one", STAGES[1]), ("two", STAGES[1]), ("one", STAGES[0]))
    )
    for path, matrix in one.items():
        assert (matrix - two[path]).norm() <= 0.01 * (matrix - start[path]).norm(), path
