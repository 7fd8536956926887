"""adalora: output by hand, the schedule, the budget, a file that holds all triplets, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import SVDLinear
from safetensors.torch import load_file
from torch import nn

from swift_cl.errors import UserError
from swift_cl.training.flags import check_method_flags
from swift_cl.tuners.adalora import AdaLoRA
from swift_cl.tuners.adalora.allocation import (
    Allocation,
    base_of,
    load_importance,
    orthogonality_penalty,
    set_schedule,
)
from tests.support.fake_context import FakeContext, FakeGradients
from tests.support.tiny_lora import language_model

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
MATRICES = 2 * 3


def config(**settings: Any) -> AdaLoraConfig:
    values = {"init_r": 4, "target_r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "total_step": 100}
    return AdaLoraConfig(**{**values, **settings})


class FakeSession:
    """Gives watchers whole gradients and weights, as `swift_cl.training.session.Session` does."""

    def __init__(self) -> None:
        self.watchers: list[Any] = []

    def step(self, model: Any, optimizer: Any, number: int) -> None:
        ctx = FakeContext(model)
        ctx.step = number
        grads = FakeGradients({name: p.grad for name, p in ctx.parameters.items()})
        for watcher in self.watchers:
            watcher.before_method(ctx, grads)
            watcher.gradients(ctx, grads)
        for name, parameter in ctx.parameters.items():
            parameter.grad = grads[name]
        optimizer.step()
        for parameter in ctx.parameters.values():
            parameter.grad.zero_()  # as an engine may before anyone asks
        for watcher in self.watchers:
            watcher.after_step(ctx)


def begin(model: Any, steps: int, session: FakeSession | None = None, resumed: Path | None = None) -> Allocation:
    """The callback of a training of that many steps."""
    callback = Allocation(None, SimpleNamespace(cl_session=session))
    args = SimpleNamespace(resume_from_checkpoint=resumed and str(resumed))
    callback.on_train_begin(args, SimpleNamespace(max_steps=steps), None, model=model)
    return callback


def trained(steps: int = 6, session: FakeSession | None = None, made: int | None = None) -> Any:
    """The small model after a stage of that many steps, or after so many of them."""
    torch.manual_seed(0)
    model = get_peft_model(language_model(), config())
    model.peft_config["default"].cl_shares = (0.1, 0.3)
    callback = begin(model, steps, session)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps if made is None else made):
        model(input_ids=IDS, labels=IDS).loss.backward()
        session.step(model, optimizer, step) if session else optimizer.step()
        callback.on_optimizer_step(None, SimpleNamespace(global_step=step), None, model=model)
        optimizer.zero_grad()
    return model.eval()


def kept(model: Any) -> int:
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS).logits


def test_output_by_hand() -> None:
    """A [[1, 2], [3, 4]], B = I, E (2, 0), alpha 4, init_r 2, x (1, 1): 4 / 2.00001 x (2 x 3, 0)."""
    base = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(base.weight)
    layer = SVDLinear(base, "default", config(init_r=2, target_r=1), r=2, lora_alpha=4)
    with torch.no_grad():
        layer.lora_A["default"].copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.lora_B["default"].copy_(torch.eye(2))
        layer.lora_E["default"].copy_(torch.tensor([[2.0], [0.0]]))
    assert layer(torch.ones(2)).tolist() == pytest.approx([11.99994, 0.0], abs=1e-5)


def test_number_of_trained_weights() -> None:
    """2 layers of q (16 -> 16) and v (16 -> 8): r in + out r + r each."""
    model = get_peft_model(language_model(), config(target_modules=["q_proj", "v_proj"]))
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == 2 * (4 * (16 + 16) + 4 + 4 * (16 + 8) + 4)


@pytest.mark.parametrize(
    ("steps", "shares", "first", "last"),
    [
        (100, (0.1, 0.3), 10, 30),
        (10, (0.1, 0.3), 1, 3),
        (4, (0.1, 0.3), 0, 1),
        (3, (0.5, 0.4), 1, 1),
        (3, (0.1, 0.3), 0, 1),  # at least one step with the final triplets,
        (4, (0.0, 0.99), 0, 2),  # two before them, one that measures and one that takes away,
        (3, (0.7, 0.29), 1, 1),  # the second of which is behind the first ones
    ],
)
def test_schedule(steps: int, shares: tuple[float, float], first: int, last: int) -> None:
    found = config()
    found.cl_shares, found.rank_pattern = shares, {"q_proj": [True, False]}
    set_schedule(found, steps)
    assert found.rank_pattern is None  # a new stage begins with all triplets
    assert (found.total_step, found.tinit, found.tfinal) == (steps, first, last)


def test_the_schedule_of_a_file_goes_on_where_no_shares_are_given() -> None:
    found = config(total_step=100, tinit=20, tfinal=40)
    set_schedule(found, 10)
    assert (found.tinit, found.tfinal) == (2, 4)


def test_the_budget_is_met() -> None:
    model = trained()
    assert kept(model) == 2 * MATRICES
    pattern = model.peft_config["default"].rank_pattern
    assert sum(sum(rows) for rows in pattern.values()) == 2 * MATRICES


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(("made", "left"), [(1, 24), (2, 18), (3, 15)])
def test_steps_are_counted_from_one(staged: bool, made: int, left: int) -> None:
    """AdaLoRA, equation 12: 24 triplets, 12 to be left, 10 steps, of which the first and the last 3 take none away.

    So 12 + 12 (1 - (t - 1) / 6)^3 = 24, 18.9, 15.6 are left after steps 1, 2, 3.
    """
    assert kept(trained(10, FakeSession() if staged else None, made)) == left


def test_a_file_holds_all_triplets_and_the_next_task_can_use_them(tmp_path: Path) -> None:
    model = trained()
    AdaLoRA.save(model, tmp_path / "adapter", None)
    assert sorted(file.name for file in (tmp_path / "adapter").glob("*.safetensors")) == ["adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.shape[0] == 4 for name, tensor in tensors.items() if name.endswith(("lora_A", "lora_E")))
    live = AdaLoRA.live_tensors(model)
    assert {name: tensor.shape for name, tensor in live.items()} == {n: tensor.shape for n, tensor in tensors.items()}
    pattern = model.peft_config["default"].rank_pattern
    assert sum(sum(rows) for rows in pattern.values()) == 2 * MATRICES  # a run goes on with it after a checkpoint
    served = AdaLoRA.load(language_model(), tmp_path / "adapter", False).eval()
    again = AdaLoRA.load(language_model(), tmp_path / "adapter", True)
    assert torch.equal(logits(served), logits(model))
    assert torch.equal(logits(again.eval()), logits(model))
    again(input_ids=IDS, labels=IDS).loss.backward()
    taken = [p.grad[p == 0] for name, p in again.named_parameters() if "lora_E" in name]
    assert sum(part.numel() for part in taken) == 2 * MATRICES
    assert all(bool((part != 0).all()) for part in taken)


def test_importance_travels_with_a_checkpoint(tmp_path: Path) -> None:
    model = trained(steps=20)
    allocator = model.base_model.rankallocator
    model.base_model.peft_config["default"].total_step = 1 << 20  # as in the middle: the end of a stage forgets them
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    allocator.update_ipt(model.base_model.model)
    AdaLoRA.save(model, tmp_path / "checkpoint-5", None)
    other = trained(steps=6)
    load_importance(other.base_model, tmp_path / "checkpoint-5")
    found = other.base_model.rankallocator
    for mine, theirs in ((allocator.exp_avg_ipt, found.exp_avg_ipt), (allocator.exp_avg_unc, found.exp_avg_unc)):
        assert mine
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    patterns = [found.peft_config["default"].rank_pattern for found in (model, other)]
    assert patterns[0] == patterns[1]
    with pytest.raises(UserError, match=r"adalora_importance\.safetensors: file not found"):
        load_importance(other.base_model, tmp_path)


def test_a_resumed_run_goes_on_with_schedule_importances_and_what_is_taken(tmp_path: Path) -> None:
    """Steps 5 and 6 of 10, both from the weights of the checkpoint after step 4."""
    folder = tmp_path / "checkpoint-4"
    half = trained(10, made=4)
    AdaLoRA.save(half, folder, None)
    again = AdaLoRA.load(language_model(), folder, True)
    begin(again, 10, resumed=folder)
    resumed = again.peft_config["default"]
    assert (resumed.total_step, resumed.tinit, resumed.tfinal) == (10, 1, 3)
    assert kept(again) == kept(half) == 15 - 2
    for step in (5, 6):
        found = []
        for model in (half, again):
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            model.base_model.update_and_allocate(step)
            allocator, pattern = model.base_model.rankallocator, model.peft_config["default"].rank_pattern
            found.append((allocator.exp_avg_ipt, allocator.exp_avg_unc, pattern))
        for one, two in zip(*(each[:2] for each in found), strict=True):
            assert one.keys() == two.keys()
            assert all(torch.allclose(one[name], two[name], atol=1e-9) for name in one)
        assert found[0][2] == found[1][2]


def test_wrapped_by_an_engine() -> None:
    model = get_peft_model(language_model(), config())
    assert base_of(SimpleNamespace(module=model)) is base_of(model) is model.base_model


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(UserError, match="--tuner_type adalora needs at least 3 steps, this training has 2"):
        trained(steps=2)
    assert kept(trained(steps=3)) == 2 * MATRICES


def test_in_a_stage_the_same_triplets_are_taken() -> None:
    """Through whole copies, as a stage gives them under every engine, or from the model itself."""
    plain, staged = trained(), trained(session=FakeSession())
    patterns = [model.peft_config["default"].rank_pattern for model in (plain, staged)]
    assert patterns[0] == patterns[1]
    assert kept(staged) == 2 * MATRICES
    assert torch.allclose(logits(plain), logits(staged), atol=1e-6)


def test_penalty_by_hand() -> None:
    """A A^T - I = [[4, 11], [11, 24]] of norm sqrt(834), B^T B = I: the mean of two, and (A A^T - I) A / norm."""
    weights = {"l.lora_A.default": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "l.lora_B.default": torch.eye(2)}
    penalty, pulls = orthogonality_penalty({**weights, "l.lora_E.default": torch.ones(2, 1)})
    assert penalty.item() == pytest.approx(834**0.5 / 2)
    expected = torch.tensor([[37.0, 52.0], [83.0, 118.0]]) / 834**0.5
    assert torch.allclose(pulls["l.lora_A.default"], expected)
    assert not pulls["l.lora_B.default"].any()
    assert len(pulls) == 2


def test_in_a_stage_the_loss_is_that_of_the_data_and_the_gradient_has_the_penalty() -> None:
    """A loss that is computed anew from the logits loses what a forward adds to its own."""
    torch.manual_seed(0)
    model, session = get_peft_model(language_model(), config(orth_reg_weight=0.5)), FakeSession()
    model.peft_config["default"].cl_shares = (0.1, 0.3)
    begin(model, 6)  # a plain `swift sft`
    with_penalty = model(input_ids=IDS, labels=IDS).loss.item()
    callback = begin(model, 6, session)
    alone = model(input_ids=IDS, labels=IDS).loss.item()
    ctx = FakeContext(model)
    penalty, pulls = orthogonality_penalty(ctx.weights())
    assert with_penalty == pytest.approx(alone + 0.5 * penalty.item(), rel=1e-5)
    grads = FakeGradients({name: torch.zeros_like(p) for name, p in ctx.parameters.items()})
    ctx.is_logging_step = False
    callback.before_method(ctx, FakeGradients(grads.values))
    assert not ctx.logged
    ctx.is_logging_step = True
    callback.before_method(ctx, grads)
    assert ctx.logged == {"adalora_orthogonality": penalty.item()}
    assert all(torch.allclose(grads[name], 0.5 * pull) for name, pull in pulls.items())
    assert any(bool(pull.any()) for pull in pulls.values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--adalora_tfinal", "10"],
            "--adalora_tfinal counts steps, which differ from task to task; pass --adalora_fin",
        ),
        (
            ["--adalora_tinit", "10"],
            "--adalora_tinit counts steps, which differ from task to task; pass --adalora_warmup",
        ),
        (["--adalora_target_r", "12"], "--adalora_init_r is 12, allowed: a whole number above --adalora_target_r (12)"),
        (["--adalora_target_r", "0"], "--adalora_init_r is 12, allowed: a whole number above --adalora_target_r (0)"),
        (["--adalora_final_share", "0.9"], "--adalora_final_share is 0.9, allowed: a number above 0 and below 1 - "),
        (["--adalora_init_r", "8"], "--adalora_init_r is 8, allowed: a whole number above --adalora_target_r (8)"),
        (["--adalora_final_share", "0"], "--adalora_final_share is 0.0, allowed: a number above 0"),
        (["--adalora_warmup_share", "1"], "--adalora_warmup_share is 1.0, allowed: a number from 0 to below 1"),
        (["--adalora_target", "1"], "--adalora_target is unknown, adalora has: adalora_warmup_share"),
        (["--use_dora", "true"], "--use_dora true does not work with --tuner_type adalora"),
    ],
)
def test_refused_flags(flags: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_method_flags(["--model", "m", "--cl_method", "seq", "--cl_task", "t", "--tuner_type", "adalora", *flags])
    assert str(caught.value).startswith(said)


def test_flags_at_the_ends_of_their_ranges() -> None:
    flags = ["--adalora_warmup_share", "0", "--adalora_final_share", "0.99", "--adalora_init_r", "9"]
    check_method_flags(["--model", "m", "--cl_method", "seq", "--cl_task", "t", "--tuner_type", "adalora", *flags])
