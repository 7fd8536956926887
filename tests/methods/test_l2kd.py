"""l2kd: its loss by hand, its teacher's stage, and the teacher's answers (section 4 of the specification)."""

from pathlib import Path

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.io import MethodState, sha256_file
from swift_cl.methods.l2kd import L2kd, L2kdConfig
from swift_cl.training.flags import config_from_flags, flag_values
from swift_cl.training.phases import phase_argv
from tests.methods.test_lamol_kd import CHANNELS, batch, moved, sharpened
from tests.methods.test_lwf_teacher import Quiet
from tests.support.fake_context import FakeContext
from tests.support.fake_engine import Engines, FakeEngine, said
from tests.support.synthesised import KeptText, kind_rows
from tests.support.tiny_lora import continued, stage_adapter
from tests.support.train import adapter, stage_argv, train_stage


def l2kd(**settings):
    config = L2kdConfig(**settings)
    config.validate()
    return L2kd(config)


@pytest.mark.parametrize(("norm", "expected"), [("token", 1.275), ("group", 3.05)])
def test_two_ways_to_norm(norm, expected):
    """New qa KD [.4, .6], generated qa CE [2]; new lm KD [.2, .2], generated lm CE [1, 3]; lambda .25."""
    method, ctx = l2kd(norm=norm), FakeContext()
    method.train_begin(ctx)
    labels = torch.tensor([[-100, 1, 1], [-100, 1, 1], [-100, 1, -100], [-100, 1, 1]])
    method.window(ctx, [{"labels": labels, "channel": CHANNELS}])
    assert float(method.total(ctx, torch.tensor([1.0, 0.4, 2.0, 4.0]))) == pytest.approx(expected)


def taught_stage(folder, **settings):
    """A stage whose teacher is the adapter that the student starts from."""
    stage_adapter(folder)
    model = continued(folder)
    ctx = Quiet(model, task="t1", earlier=["t0"], folder=folder)
    ctx.phases = {"teacher": folder / "t0" / "adapter"}
    method = l2kd(**settings)
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    return method, ctx, model


def loss_of(method, ctx, model, inputs, channels):
    ctx.channels = channels
    method.window(ctx, [{**inputs, "channel": channels}])
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return method.loss(ctx, model, inputs, torch.zeros(()), outputs)


def test_a_student_that_is_its_teacher_learns_nothing_from_new_rows(tmp_path):
    """A cross-entropy left on new rows would move it."""
    method, ctx, model = taught_stage(tmp_path)
    loss_of(method, ctx, model, batch(), ["new/qa", "new/lm", "new/qa", "new/lm"]).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert max(float(g.abs().max()) for g in gradients) < 1e-7
    loss_of(method, ctx, model, batch(), CHANNELS).backward()
    assert max(float(g.abs().max()) for g in gradients) > 1e-3, "generated rows keep their cross-entropy"


@pytest.mark.parametrize(("temperature", "lm"), [(2.0, 0.25), (3.0, 0.5)])
def test_new_rows_are_distilled_and_generated_ones_are_not(tmp_path, temperature, lm):
    """T^2 (KL_QA + lambda KL_LM) of new rows and CE_QA + lambda CE_LM of generated ones, by plain formulas."""
    method, ctx, model = taught_stage(tmp_path, norm="group", kd_temperature=temperature, lambda_=lm)
    moved(sharpened(model))
    inputs = batch()
    total = loss_of(method, ctx, model, inputs, CHANNELS)
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        student, teacher = model(**given).logits[:, 2:5], sharpened(continued(tmp_path))(**given).logits[:, 2:5]
    log_q, log_p = (torch.log_softmax(z / temperature, -1) for z in (student, teacher))
    divergence = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    losses = torch.nn.functional.cross_entropy(
        student.flatten(0, 1), inputs["labels"][:, 3:].flatten(), reduction="none"
    )
    entropy = losses.view(4, 3).mean(1)
    expected = divergence[0] + lm * divergence[1] + entropy[2] + lm * entropy[3]
    assert min(divergence[:2].tolist()) > 0.01
    assert ctx.logged["l2kd_new_qa"] == pytest.approx(divergence[0].item(), rel=1e-4)
    assert total.item() == pytest.approx(expected.item())
    other = {**inputs, "labels": inputs["labels"].clone()}
    other["labels"][:2, 3:] = 5  # labels of new rows say where, not what
    assert loss_of(method, ctx, model, other, CHANNELS).item() == pytest.approx(expected.item())


def test_the_teacher_is_asked_in_the_micro_batch_that_has_new_rows(tmp_path):
    """A row without a channel is a new one."""
    method, ctx, model = taught_stage(tmp_path, norm="group")
    moved(model)
    inputs, micro_batches = batch(), [None, ["pseudo/qa"] * 4]
    method.window(ctx, [{**inputs, "channel": channels} for channels in micro_batches])
    outputs, found = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]), []
    for ctx.channels in micro_batches:
        method.loss(ctx, model, inputs, torch.zeros(()), outputs)
        found.append((ctx.logged["l2kd_new_qa"] > 1e-3, ctx.logged["l2kd_pseudo_qa"] > 1e-3))
    assert found == [(True, False), (False, True)]


@pytest.mark.parametrize(("variant", "distils"), [("word", True), ("seq", False), ("seq_soft", True)])
def test_which_variants_distil(tmp_path, variant, distils):
    """The student is its teacher: distilled, new rows cost 0; under `seq` their tokens do."""
    method, ctx, model = taught_stage(tmp_path, variant=variant, norm="group")
    loss_of(method, ctx, model, batch(), CHANNELS)
    assert (abs(ctx.logged["l2kd_new_qa"]) < 1e-6) is distils
    assert ctx.logged["l2kd_pseudo_qa"] > 1
    assert any("l2kd_teacher" in name for name, _ in model.named_parameters()) is distils


def test_only_the_same_teacher_goes_on(tmp_path):
    method, ctx, _ = taught_stage(tmp_path)
    state = method.checkpoint_state(ctx)
    assert state.meta == {"teacher_sha256": sha256_file(tmp_path / "t0" / "adapter" / "adapter_model.safetensors")}
    method.restore_checkpoint(ctx, state)
    with pytest.raises(UserError, match="the checkpoint was trained with another teacher: sha256 abc"):
        method.restore_checkpoint(ctx, MethodState(meta={"teacher_sha256": "abc"}))


def test_without_a_teacher_it_is_lamol(tmp_path):
    stage_adapter(tmp_path)
    model = continued(tmp_path)
    ctx, method = Quiet(model), l2kd()
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    loss_of(method, ctx, model, batch(), ["new/qa", "new/lm", "new/qa", "new/lm"])
    assert ctx.logged["l2kd_qa"] > 1
    assert method.checkpoint_state(ctx) is None


@pytest.mark.parametrize("variant", ["seq", "seq_soft"])
def test_the_teachers_answers_take_the_place_of_the_given_ones(tmp_path, variant):
    """`T: ` and the question; one is cut off, one empty: they keep what was given. Generated rows are left alone."""

    def teacher(prompt, seed):
        question = prompt.messages[-1]["content"].rpartition("\n\n")[2]
        assert prompt.messages[0]["content"] == "You sort things."
        return {"now thing 3": said("half", "length"), "now thing 4": said(" ")}.get(question, said(f"T: {question}"))

    def previous(prompt, seed):
        return said(f"question {seed}\n__ans__\nold answer")

    class Labelled(KeptText):
        def encode(self, rows):
            return [{**row, "labels": [-100, 1, 1]} for row in rows]

    first = l2kd(variant=variant, num_beams=3)
    ctx = Labelled(task="old", folder=tmp_path / "1")
    first.prepare_task(ctx, kind_rows("old", 20))
    state = first.end_task(ctx)
    ctx = Labelled(task="now", earlier=["old"], state=state, folder=tmp_path / "2")
    ctx.phases = {"teacher": tmp_path / "teacher"}
    ctx.engines = Engines(
        {
            ctx.phases["teacher"]: FakeEngine(teacher, "teacher"),
            ctx.earlier[0].weights_dir: FakeEngine(previous, "previous"),
        }
    )
    rows = kind_rows("now", 10)
    mixed = l2kd(variant=variant, num_beams=3).prepare_task(ctx, rows)
    answers = [row["messages"][2]["content"] for row in mixed if row["channel"] == "new/qa"]
    expected = [f"T: now thing {i}" for i in range(10)]
    expected[3:5] = ["now kind 3", "now kind 4"]
    assert answers == expected
    assert [row["messages"][2]["content"] for row in mixed if row["channel"] == "pseudo/qa"] == ["old answer"] * 2
    assert next(row for row in mixed if row["channel"] == "new/lm")["messages"][2]["content"].endswith("T: now thing 0")
    (asked,) = ctx.engines.engines[ctx.phases["teacher"]].calls
    assert (asked[1].temperature, asked[1].beams) == (0, 3)
    assert ctx.engines.engines[ctx.earlier[0].weights_dir].calls[0][1].beams == 1, "generated rows are drawn"
    assert asked[1].max_new_tokens == 3  # 1.5 x the 2 tokens of an answer
    assert ctx.notices[0].startswith("2 of 10 rows keep their given answer")
    assert rows[0]["messages"][2]["content"] == "now kind 0", "the rows that statistics see are changed"


class Lengths(KeptText):
    """The answer of row i has i + 1 tokens."""

    backends = ()

    def encode(self, rows):
        return [{**row, "labels": [-100, -100, *[1] * (i + 1)]} for i, row in enumerate(rows)]

    def engine(self, weights, backend):
        self.backends = (*self.backends, backend)
        return super().engine(weights, backend)


def answered(folder, engine, rows, **settings):
    """(rows of a first stage, its context) under the variant `seq`."""
    ctx = Lengths(task="now", folder=folder)
    ctx.phases = {"teacher": folder / "teacher"}
    ctx.engines = Engines({ctx.phases["teacher"]: engine})
    return l2kd(**{"variant": "seq", "gen_batch_size": 8, **settings}).prepare_task(ctx, rows), ctx


def test_how_the_teacher_is_asked(tmp_path):
    """Answers of 1 to 20 tokens: 19 of 20 have at most 19, so ceil(1.5 x 19) = 29; of the longest it would be 30."""
    engine, rows = FakeEngine(lambda prompt, seed: said("T")), kind_rows("now", 20)
    _, ctx = answered(tmp_path / "a", engine, rows)
    assert {sampling.max_new_tokens for _, sampling, _ in engine.calls} == {29}
    assert [len(prompts) for prompts, _, _ in engine.calls] == [6, 7, 7], "eight at a time at most"
    assert all([message["role"] for message in prompt.messages] == ["system", "user"] for prompt in engine.prompts)
    assert ctx.backends == ("transformers",)
    engine.calls.clear()
    _, ctx = answered(tmp_path / "b", engine, rows, max_new_tokens=11, gen_backend="vllm")
    assert {sampling.max_new_tokens for _, sampling, _ in engine.calls} == {11}
    assert ctx.backends == ("vllm",)


def test_an_answer_with_a_special_token_is_not_taken(tmp_path):
    engine = FakeEngine(lambda prompt, seed: said("T <|end|>" if prompt.messages[1]["content"][-1] == "2" else "T"))
    mixed, _ = answered(tmp_path, engine, kind_rows("now", 4))
    assert [row["messages"][2]["content"] for row in mixed[:4]] == ["T", "T", "now kind 2", "T"]


def test_answers_are_reused_where_nothing_else_was_asked(tmp_path):
    def speaks(prompt, seed):
        return said("T")

    def calls(rows, name="teacher", **settings):
        engine = FakeEngine(speaks, name)
        answered(tmp_path, engine, rows, **settings)
        return len(engine.calls)

    rows = kind_rows("now", 4)
    assert calls(rows) == 1
    assert calls(rows) == 0
    assert calls(kind_rows("then", 4)) == 1, "other questions"
    assert calls(rows, "retrained") == 1, "another teacher"
    assert calls(rows, num_beams=2) == 1, "another search"
    assert calls(rows) == 0


def test_word_needs_no_answers_of_the_teacher(tmp_path):
    ctx = KeptText(task="now", folder=tmp_path)
    ctx.phases = {"teacher": tmp_path / "teacher"}
    rows = kind_rows("now", 10)
    mixed = l2kd().prepare_task(ctx, rows)
    assert [row["messages"] for row in mixed[:10]] == [row["messages"] for row in rows]


def teacher_argv(argv):
    """(flags, folder) of the teacher's stage, None where there is none."""
    given = flag_values(argv)
    *before, _own = L2kd(config_from_flags(L2kd, given)).phases("cl_previous" not in given)
    return phase_argv(L2kd, before[0], given) if before else None


def test_flags_of_the_teachers_stage(tmp_path):
    settings = {"l2kd_lambda": 0.5, "l2kd_teacher_epochs": 2.0, "l2kd_token": "shared"}
    argv = stage_argv("l2kd", "now", tmp_path / "2", tmp_path / "1", **settings)
    own, folder = teacher_argv(argv)
    given = dict(zip(own[::2], own[1::2], strict=True))
    assert given["--cl_method"] == "lamol"
    assert given["--lamol_lambda"] == "0.5"
    assert given["--lamol_token"] == "shared"
    assert given["--num_train_epochs"] == "2.0"
    assert given["--cl_task"] == "now"
    assert given["--output_dir"] == str(folder)
    assert folder.parent == Path(tmp_path / "2" / "cl_data" / "l2kd")
    assert "--cl_previous" not in given, "a teacher that continues an earlier stage is not fresh"
    assert not [name for name in given if name.startswith("--l2kd")]
    assert teacher_argv(stage_argv("l2kd", "now", tmp_path / "2", tmp_path / "1", learning_rate=1.0))[1] != folder
    assert teacher_argv(stage_argv("l2kd", "now", tmp_path / "2", l2kd_first_task="distill")) is not None
    assert teacher_argv(stage_argv("l2kd", "now", tmp_path / "2", l2kd_first_task="plain")) is None
    assert teacher_argv(stage_argv("l2kd", "now", tmp_path / "2", tmp_path / "1", l2kd_first_task="plain")) is not None


def test_the_teacher_is_kept_where_asked():
    assert [l2kd(keep_teacher=kept).keeps_phases() for kept in (False, True)] == [False, True]


def test_published_values():
    config = L2kdConfig()
    assert (config.variant, config.kd_temperature, config.norm, config.first_task) == ("word", 2.0, "token", "distill")
    assert (config.gamma, config.lambda_, config.top_k, config.num_beams, config.keep_teacher) == (
        0.2, 0.25, 20, 1, False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_teacher_is_fresh_and_deleted(tmp_path):
    """The teacher of a second task is the first stage that lamol would train on these rows, bit for bit."""
    train_stage("l2kd", "2022", tmp_path / "1", max_steps=1, l2kd_first_task="plain")
    train_stage("l2kd", "2023", tmp_path / "2", tmp_path / "1", max_steps=2, l2kd_keep_teacher=True)
    (teacher,) = (tmp_path / "2" / "cl_data" / "l2kd").glob("teacher-*")
    train_stage("lamol", "2023", tmp_path / "alone", max_steps=2)
    for name, tensor in adapter(tmp_path / "alone").items():
        assert torch.equal(tensor, adapter(teacher)[name]), name
    train_stage("l2kd", "2023", tmp_path / "3", tmp_path / "1", max_steps=2)
    assert not list((tmp_path / "3" / "cl_data" / "l2kd").glob("teacher-*"))
    for name, tensor in adapter(tmp_path / "2").items():
        assert torch.equal(tensor, adapter(tmp_path / "3")[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kd_temperature": 0.0}, "--l2kd_kd_temperature is 0.0"),
        ({"teacher_epochs": -1.0}, "--l2kd_teacher_epochs is -1.0"),
        ({"lambda_": 0.0}, "--l2kd_lambda is 0.0"),
        ({"num_beams": 0}, "--l2kd_num_beams is 0, allowed: 1 or more"),
        ({"num_beams": 2}, "--l2kd_num_beams is 2, allowed: 1, because with --l2kd_variant word"),
        (
            {"num_beams": 2, "variant": "seq", "gen_backend": "vllm"},
            "--l2kd_num_beams is 2, allowed: 1 with --l2kd_gen_backend vllm",
        ),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        l2kd(**settings)
