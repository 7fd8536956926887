"""dynamic_conpet_cls: heads of experts by hand (section 4 of the specification), and two small real stages."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.io import load_method_state
from swift_cl.methods._draws import seed32
from swift_cl.methods._heads import class_loss, expert_logits, first_rows
from swift_cl.methods.dynamic_conpet_cls import DynamicConpetCls, DynamicConpetClsConfig
from swift_cl.stages import load_stage
from tests.conftest import ROOT
from tests.methods.test_seq_star import Classifier
from tests.support.fake_context import FakeContext
from tests.support.train import MODEL, TASKS, adapter, train_stage

LABELS = {"a": ["x", "y"], "b": ["z", "w"]}


def made(**settings: Any) -> DynamicConpetCls:
    config = DynamicConpetClsConfig(**{"labels": json.dumps(LABELS), **settings})
    config.validate()
    return DynamicConpetCls(config)


def test_c_logits_of_other_experts_are_a_constant() -> None:
    """Expert 1 says (2, 1), expert 2 (0, 3), and expert 2 was chosen."""
    logits, second = torch.tensor([[2.0, 1.0, 0.0, 3.0]]), torch.tensor([False, False, True, True])
    found = expert_logits(logits, second, -100.0)
    assert found.tolist() == [[-100.0, -100.0, 0.0, 3.0]]
    expected = [-103.0486, -103.0486, -3.0486, -0.0486]
    assert torch.log_softmax(found, -1)[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert int(found.argmax()) == 3
    everything = torch.ones(4, dtype=torch.bool)
    assert float(class_loss(found, torch.tensor([2]), everything)) == pytest.approx(3.0486, abs=1e-4)


@pytest.mark.parametrize("null", [-100.0, -1.0])
def test_only_the_rows_of_the_task_learn(null: float) -> None:
    """Of a later task: the old expert's classes are in the softmax with their constant, and get no gradient."""
    method, model = made(null_logit=null), Classifier()
    ctx = FakeContext(model, task="b", earlier=["a"])
    ctx.previous_state = lambda: SimpleNamespace(meta={"settings": vars(method.config)})  # type: ignore[method-assign]
    # The stand-in has one more layer, which is no LoRA.
    model.lora.requires_grad_(False)
    method.prepare_model(ctx, model)
    start = model.head.weight.detach().clone()
    assert torch.equal(start[:2], torch.zeros(2, 2))
    assert torch.equal(start[2:], first_rows(2, 2, False, seed32(method.name, ctx.seed, "b")))
    method.train_begin(ctx)
    inputs = {"labels": torch.tensor([2, 3, 3])}
    method.window(ctx, [inputs])
    hidden = torch.tensor([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0]])
    loss = method.loss(ctx, model, inputs, torch.zeros(()), SimpleNamespace(logits=model.head(hidden)))
    assert loss is not None
    own = hidden @ start[2:].T
    whole = torch.cat([torch.full((3, 2), null), own], 1)
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(whole, inputs["labels"])), abs=1e-6)
    torch.autograd.backward(loss)
    gradient = model.head.weight.grad
    assert gradient is not None
    assert torch.equal(gradient[:2], torch.zeros(2, 2))
    assert bool((gradient[2:] != 0).any())
    assert method.export_files(ctx) == {
        "classes.json": {"labels": ["x", "y", "z", "w"], "visible": [2, 3], "elsewhere": null}
    }


def test_the_first_tasks_softmax_knows_no_later_class() -> None:
    """Logits of 0 of two own classes: ln 2, a mean over the four rows of two micro-batches, of 3 rows and of 1.

    With the later two in it, at -1, it would be ln(2 + 2 / e)."""
    method, model = made(null_logit=-1.0), Classifier()
    ctx = FakeContext(model, task="a")
    model.lora.requires_grad_(False)
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    parts = [{"labels": torch.tensor([0, 1, 0])}, {"labels": torch.tensor([1])}]
    method.window(ctx, parts)
    total = 0.0
    for part in parts:
        logits = torch.tensor([[0.0, 0.0, 9.0, 9.0]] * len(part["labels"]))
        loss = method.loss(ctx, model, part, torch.zeros(()), SimpleNamespace(logits=logits))
        assert loss is not None
        total += float(loss)
    assert total == pytest.approx(0.693147, abs=1e-6)


def test_a_head_of_another_size_is_refused() -> None:
    labels = json.dumps({**LABELS, "c": ["more"]})
    model = Classifier()
    model.lora.requires_grad_(False)
    with pytest.raises(UserError, match="--num_labels is 4, --dynamic_conpet_cls_labels has 5 classes"):
        made(labels=labels).prepare_model(FakeContext(model, task="a"), model)


def test_the_scenario_says_who_chooses() -> None:
    assert not made().needs_task_id()
    assert made(scenario="til").needs_task_id()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"null_logit": 0.0}, "--dynamic_conpet_cls_null_logit is 0.0, allowed: a number < 0"),
        ({"lr": 0.0}, "--dynamic_conpet_cls_lr is 0.0, allowed: a number > 0"),
        ({"memory": 0}, "--dynamic_conpet_cls_memory is 0"),
        ({"labels": '{"a": ["x"], "b": ["x"]}'}, "--dynamic_conpet_cls_labels: the label 'x' stands in 'a' and in 'b'"),
    ],
)
def test_values_that_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(**settings)


def test_another_setting_than_the_stage_before(tmp_path: Path) -> None:
    method, model = made(null_logit=-5.0), Classifier()
    ctx = FakeContext(model, task="b", earlier=["a"])
    before = {**vars(method.config), "null_logit": -100.0}
    ctx.previous_state = lambda: SimpleNamespace(meta={"settings": before})  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"_null_logit is -5.0, but the stage before was trained with -100.0"):
        method.train_begin(ctx)


def test_a_served_expert_keeps_other_classes_at_the_constant() -> None:
    """The server holds an answer to the labels of a request; among them, other experts' classes have the constant."""
    path = ROOT / "swift_cl" / "serving" / "worker" / "classes.py"
    spec = importlib.util.spec_from_file_location("worker_classes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Head(torch.nn.Module):
        def forward(self) -> Any:
            return SimpleNamespace(logits=torch.tensor([[2.0, 1.0, -3.0, -4.0, 9.0]]))

    model, lowest = Head(), torch.finfo(torch.float32).min
    expert = module.Classes(["x", "y", "z", "w", "v"], [2, 3], -100.0)
    with expert.held(model, ["x", "y", "z", "w"]):
        assert model().logits.tolist() == [[-100.0, -100.0, -3.0, -4.0, lowest]]
    with expert.held(model, []):
        assert model().logits.tolist() == [[lowest, lowest, -3.0, -4.0, lowest]]
    with module.Classes(["x", "y", "z", "w", "v"], [0, 1, 2, 3]).held(model, ["x", "z"]):
        assert model().logits.tolist() == [[2.0, lowest, -3.0, lowest, lowest]]


@pytest.mark.slow
def test_two_tasks(tmp_path: Path) -> None:
    """Each expert alone, from the base model; the selector is a LoRA without a head that PEFT loads on any model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    one, two = tmp_path / "1", tmp_path / "2"
    quick = {"max_steps": 2, "save_steps": 100}
    train_stage("dynamic_conpet_cls", TASKS[0], one, **quick)
    train_stage("dynamic_conpet_cls", TASKS[1], two, one, **quick)
    heads = [adapter(stage)["base_model.model.score.weight"] for stage in (one, two)]
    assert not heads[0][2:].any()
    assert not heads[1][:2].any()
    assert all(bool(part.any()) for part in (heads[0][:2], heads[1][2:]))
    stage = load_stage(two)
    assert stage.route is not None
    assert [candidate["name"] for candidate in stage.route["candidates"]] == list(TASKS)
    assert load_method_state(two / "cl_state", "dynamic_conpet_cls").tensors["head/weight"].shape[0] == 2
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    selector = PeftModel.from_pretrained(base, str(two / "cl_state" / "selector"))
    names = [name for name, _ in selector.named_parameters() if "default" in name]
    assert names
    assert all("lora_" in name for name in names), "the selector carries a copy of the head"
