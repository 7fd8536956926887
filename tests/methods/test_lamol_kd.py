"""lamol_kd: the four parts of its loss by hand, and its teacher on a real model (section 3 of the specification)."""

import math
from types import SimpleNamespace

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.io import MethodState, sha256_file
from swift_cl.methods._frozen_teacher import FrozenTeacher, asked_in, distilled_sums, is_generated, rows_of_batch
from swift_cl.methods.lamol_kd import LamolKd, LamolKdConfig
from tests.methods.test_lwf_teacher import Quiet
from tests.support.fake_context import FakeContext
from tests.support.ranks import on_ranks
from tests.support.tiny_lora import continued, language_model, stage_adapter

CHANNELS = ["new/qa", "new/lm", "pseudo/qa", "pseudo/lm"]


def lamol_kd(**settings):
    config = LamolKdConfig(**settings)
    config.validate()
    return LamolKd(config)


def test_o1_shift_and_o2_direction():
    """Sums over the supervised positions of the shifted mask; index 1 predicts the first label."""
    teacher, student = torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)
    teacher[0, 1, 0] = math.log(2)
    labels = torch.tensor([[-100, -100, 2, 1]])
    mask = labels[:, 1:] != -100
    groups = torch.zeros(2, dtype=torch.long)
    for temperature, expected in ((1.0, 0.0588915), (2.0, 0.0568822)):
        found = distilled_sums(student[:, :-1][mask], teacher[:, :-1][mask], groups, 2, temperature)
        assert found.tolist() == pytest.approx([expected, 0.0], abs=1e-7)
    peaked = torch.tensor([[0.9, 0.05, 0.05]]).log()
    assert float(distilled_sums(torch.zeros(1, 3), peaked, groups[:1], 1, 1.0)) == pytest.approx(0.7042145)


@pytest.mark.parametrize(("weight", "hard", "expected"), [(1.0, 0.0, 2.8), (0.5, 0.0, 2.65), (1.0, 2.0, 9.3)])
def test_four_parts(weight, hard, expected):
    """New qa [1, 2], new lm [3, 5], distilled qa [.1, .3], lm [.4]; hard adds 2 x (2.5 + .25 x 3) = 6.5."""
    method = lamol_kd(weight=weight, hard_weight=hard)
    ctx = FakeContext()
    method.train_begin(ctx)
    labels = torch.tensor([[-100, 1, 1], [-100, 1, 1], [-100, 1, 1], [-100, 1, -100]])
    method.window(ctx, [{"labels": labels, "channel": CHANNELS}])
    total = method._distil.total(ctx, torch.tensor([3.0, 8.0, 0.4, 0.4]), "lamol_kd")
    if hard:
        total = total + method._hard.total(ctx, torch.tensor([0.0, 0.0, 5.0, 3.0]), "hard")
    assert float(total) == pytest.approx(expected)
    assert ctx.logged["lamol_kd_pseudo_qa"] == pytest.approx(0.2)


def batch(count=4):
    """Rows of six tokens, the last three supervised, one a channel."""
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (count, 6))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def second_stage(folder, **settings):
    model = continued(folder)
    ctx = Quiet(model, task="t1", earlier=["gone", "t0"], folder=folder)
    method = lamol_kd(**settings)
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    return method, ctx, model


def loss_of(method, ctx, model, inputs, channels):
    ctx.channels = channels
    method.window(ctx, [{**inputs, "channel": channels}])
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return method.loss(ctx, model, inputs, torch.zeros(()), outputs)


def test_before_the_first_step_the_old_rows_cost_nothing(tmp_path):
    stage_adapter(tmp_path)
    method, ctx, model = second_stage(tmp_path)
    inputs = batch()
    total = loss_of(method, ctx, model, inputs, CHANNELS)
    # Teacher and student run on different numbers of lines, which processors round differently in fp32.
    assert abs(ctx.logged["lamol_kd_pseudo_qa"]) < 1e-6
    assert abs(ctx.logged["lamol_kd_pseudo_lm"]) < 1e-6
    expected = ctx.logged["lamol_kd_new_qa"] + 0.25 * ctx.logged["lamol_kd_new_lm"]
    assert total.item() == pytest.approx(expected)


def test_dropout_is_the_students_alone(tmp_path):
    """O8: two passes of the teacher are equal bit for bit, and the student is what it was."""
    stage_adapter(tmp_path, lora_dropout=0.5)
    method, ctx, model = second_stage(tmp_path)
    inner = model.get_base_model().model
    inner.norm = torch.nn.Sequential(inner.norm, torch.nn.Dropout(0.5))  # a base model has dropout of its own
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    inputs = batch()
    assert torch.equal(method._teacher.logits(ctx, inputs), method._teacher.logits(ctx, inputs))
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert any(p.requires_grad for p in model.parameters())
    loss_of(method, ctx, model, inputs, CHANNELS)
    assert ctx.logged["lamol_kd_pseudo_qa"] > 0


def test_no_graph_of_the_teacher_is_kept(tmp_path):
    """Gradient checkpointing makes embeddings ask for a gradient, though nothing in the teacher is trained."""
    stage_adapter(tmp_path)
    method, ctx, model = second_stage(tmp_path)
    model.enable_input_require_grads()
    assert not method._teacher.logits(ctx, batch()).requires_grad


def test_the_teacher_computes_no_loss(tmp_path):
    stage_adapter(tmp_path)
    method, ctx, model = second_stage(tmp_path)
    seen = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(sorted(given)), with_kwargs=True)
    method._teacher.logits(ctx, batch())
    assert seen == [["attention_mask", "input_ids"]]


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    stage_adapter(tmp_path)
    method, ctx, model = second_stage(tmp_path)
    inputs, ctx.channels = batch(), CHANNELS
    method.window(ctx, [{**inputs, "channel": CHANNELS}])
    with pytest.raises(UserError, match=r"the teacher's logits are \(2, 6, 64\) and the student's \(4, 6, 65\)"):
        method.loss(ctx, model, inputs, torch.zeros(()), SimpleNamespace(logits=torch.zeros(4, 6, 65)))


def test_published_values():
    config = LamolKdConfig()
    assert (config.weight, config.kd_temperature, config.hard_weight) == (1.0, 2.0, 0.0)
    assert (config.gamma, config.lambda_, config.top_k, config.gen_temperature) == (0.2, 0.25, 20, 1.0)


def sharpened(model):
    """The model with logits so far apart that a temperature changes more than the last digits."""
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(50)
    return model


def moved(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.add_(0.3)


def test_the_teacher_is_the_previous_adapter(tmp_path):
    stage_adapter(tmp_path)
    method, ctx, model = second_stage(tmp_path)
    moved(model)
    inputs = batch()
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    taught = method._teacher.logits(ctx, inputs)
    with torch.no_grad():
        previous = continued(tmp_path).eval()(**given).logits
        base = language_model()(**given).logits
        student = model(**given).logits
    torch.testing.assert_close(taught, previous, rtol=0, atol=1e-6)
    assert (taught - base).abs().max() > 1e-2
    assert (taught - student).abs().max() > 1e-2
    assert method._teacher.sha256 == sha256_file(tmp_path / "t0" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(("temperature", "lm", "weight", "hard"), [(2.0, 0.25, 1.0, 0.0), (3.0, 0.5, 0.7, 2.0)])
def test_old_rows_are_distilled_and_new_ones_are_not(tmp_path, temperature, lm, weight, hard):
    """The value of all parts against plain formulas: CE_QA + lambda CE_LM of new rows, w T^2 (KL_QA + lambda KL_LM) and
    h (CE_QA + lambda CE_LM) of old ones, whose labels without h do not matter, their places do."""
    stage_adapter(tmp_path)
    settings = {"kd_temperature": temperature, "lambda_": lm, "weight": weight, "hard_weight": hard}
    method, ctx, model = second_stage(tmp_path, **settings)
    moved(sharpened(model))
    inputs = batch()
    total = loss_of(method, ctx, model, inputs, CHANNELS)
    with torch.no_grad():
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        student, teacher = model(**given).logits[:, 2:5], sharpened(continued(tmp_path))(**given).logits[:, 2:5]
    log_q, log_p = (torch.log_softmax(z / temperature, -1) for z in (student, teacher))
    divergence = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    entropy = torch.nn.functional.cross_entropy(
        student.flatten(0, 1), inputs["labels"][:, 3:].flatten(), reduction="none"
    ).view(4, 3).mean(1)  # fmt: skip
    expected = entropy[0] + lm * entropy[1] + weight * (divergence[2] + lm * divergence[3])
    expected += hard * (entropy[2] + lm * entropy[3])
    assert min(divergence[2:].tolist()) > 0.01
    assert ctx.logged["lamol_kd_pseudo_qa"] == pytest.approx(divergence[2].item(), rel=1e-4)
    assert total.item() == pytest.approx(expected.item())
    if hard:
        return
    other = {**inputs, "labels": inputs["labels"].clone()}
    other["labels"][2:, 3:] = 5
    assert float(loss_of(method, ctx, model, other, CHANNELS)) == pytest.approx(float(total))
    other["labels"][0, 3:] = 5
    assert float(loss_of(method, ctx, model, other, CHANNELS)) != pytest.approx(float(total))


def test_the_teacher_is_asked_in_the_micro_batch_that_has_old_rows(tmp_path):
    stage_adapter(tmp_path)
    method, ctx, model = second_stage(tmp_path)
    moved(model)
    inputs, micro_batches = batch(), [["pseudo/qa"] * 4, ["new/qa"] * 4]
    method.window(ctx, [{**inputs, "channel": channels} for channels in micro_batches])
    outputs, found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]), []
    for ctx.channels in micro_batches:
        method.loss(ctx, model, inputs, torch.zeros(()), outputs)
        found.append(ctx.logged["lamol_kd_pseudo_qa"])
    assert found[0] > 1e-3
    assert found[1] == 0


def test_the_teacher_sees_only_lines_with_old_rows(tmp_path):
    stage_adapter(tmp_path)
    method, ctx, model = second_stage(tmp_path)
    seen = []
    original = method._teacher.logits

    def counted(ctx, inputs):
        seen.append(inputs["input_ids"].shape[0])
        return original(ctx, inputs)

    method._teacher.logits = counted
    inputs = batch()
    loss_of(method, ctx, model, inputs, ["new/qa", "pseudo/qa", "new/lm", "new/qa"])
    loss_of(method, ctx, model, inputs, ["new/qa"] * 4)
    assert seen == [1]
    # Another rank has an old row: this one takes part with a line that counts for nothing.
    method.window(ctx, [{**inputs, "channel": ["pseudo/qa"] * 4}])
    ctx.channels = ["new/qa"] * 4
    outputs = SimpleNamespace(logits=torch.randn(4, 6, 64))
    total = method.loss(ctx, model, inputs, torch.zeros(()), outputs)
    assert seen == [1, 1]
    assert ctx.logged["lamol_kd_pseudo_qa"] == 0
    entropy = torch.nn.functional.cross_entropy(
        outputs.logits[:, 2:5].flatten(0, 1), inputs["labels"][:, 3:].flatten(), reduction="sum"
    )
    assert float(total) == pytest.approx(float(entropy)), "of that line nothing is distilled"


def test_every_rank_knows_where_the_teacher_is_asked():
    """Rank 1 has an old row in the second of three micro-batches, rank 0 one in the third."""
    channels = [[["new/qa"], None, ["pseudo/lm"]], [["new/lm"], ["new/qa", "pseudo/qa"], ["new/qa"]]]

    def work(ctx):
        return asked_in(ctx, [{"channel": own} for own in channels[ctx.rank]], is_generated)

    found = on_ranks(2, lambda rank, size: FakeContext(rank=rank, world_size=size), work)
    assert found == [[False, True, True]] * 2


def test_lines_of_a_batch():
    inputs = {"labels": torch.arange(6).view(3, 2), "position_ids": torch.arange(12).view(2, 3, 2), "logits_to_keep": 2}
    part = rows_of_batch({**inputs, "scale": torch.tensor(3.0), "table": torch.zeros(7, 3)}, torch.tensor([2]))
    assert part["labels"].tolist() == [[4, 5]]
    assert part["position_ids"].tolist() == [[[4, 5]], [[10, 11]]]
    assert part["logits_to_keep"] == 2
    assert part["scale"] == 3.0
    assert part["table"].shape == (7, 3)


def test_planes_of_positions_are_not_taken_for_lines():
    """As many of them, three, as the batch has lines: each is cut, none is left out."""
    inputs = {"labels": torch.zeros(3, 2), "position_ids": torch.arange(18).view(3, 3, 2)}
    part = rows_of_batch(inputs, torch.tensor([2]))
    assert part["position_ids"].tolist() == [[[4, 5]], [[10, 11]], [[16, 17]]]


def test_a_task_may_have_any_name():
    assert is_generated("pseudo/qa")
    assert not is_generated("new/pseudo")
    assert not is_generated(None)


def test_only_the_same_teacher_goes_on(tmp_path):
    stage_adapter(tmp_path)
    method, ctx, _ = second_stage(tmp_path)
    state = method.checkpoint_state(ctx)
    method.restore_checkpoint(ctx, state)
    with pytest.raises(UserError, match="the checkpoint was trained with another teacher: sha256 abc"):
        method.restore_checkpoint(ctx, MethodState(meta={"teacher_sha256": "abc"}))
    assert lamol_kd().checkpoint_state(FakeContext()) is None
    with pytest.raises(UserError, match=r"sha256 .*, now it is None"):
        lamol_kd().restore_checkpoint(FakeContext(), state)  # a first task has no teacher


def test_two_teachers_do_not_mix(tmp_path):
    stage_adapter(tmp_path)
    model = continued(tmp_path)
    ctx = Quiet(model)
    one = FrozenTeacher(model, tmp_path / "t0" / "adapter", "one")
    before = one.logits(ctx, batch())
    two = FrozenTeacher(model, tmp_path / "t0" / "adapter", "two")
    assert torch.equal(one.logits(ctx, batch()), before)
    assert torch.equal(two.logits(ctx, batch()), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "--lamol_kd_weight is -1.0"),
        ({"weight": 0.0}, "--lamol_kd_weight is 0.0, allowed: more than 0, because"),
        ({"hard_weight": math.inf}, "--lamol_kd_hard_weight is inf"),
        ({"kd_temperature": 0.0}, "--lamol_kd_kd_temperature is 0.0"),
        ({"gamma": 2.0}, "--lamol_kd_gamma is 2.0"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        lamol_kd(**settings)
