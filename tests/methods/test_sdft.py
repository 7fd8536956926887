"""Oracle tests of sdft: the direction of the divergence, who sees what, whose weights, and positions that match."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.methods import sdft as module
from swift_cl.methods._adapters import AdapterSwitch
from swift_cl.methods._distillation import divergence_sum
from swift_cl.methods.sdft import CLOSING, Sdft, SdftConfig, with_demonstration
from tests.methods.test_abscl import ModelContext
from tests.support.route_model import CharacterTemplate
from tests.support.tiny_lora import continued, stage_adapter


def sdft(**settings: Any) -> Sdft:
    config = SdftConfig(**settings)
    config.validate()
    return Sdft(config)


# --- the divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reverse", "expected"), [(True, 0.192745), (False, 0.223144)])
def test_the_direction_of_the_divergence(reverse: bool, expected: float) -> None:
    """Student (.8, .2), teacher (.5, .5)."""
    student, teacher = torch.tensor([[0.8, 0.2]]).log(), torch.zeros(1, 2)
    mask = torch.ones(1, dtype=torch.bool)
    assert float(divergence_sum(student, teacher, mask, 1.0, 0, 4, reverse)) == pytest.approx(expected, abs=1e-6)


def test_the_gradient_of_the_reverse_divergence() -> None:
    """Against autograd, with a temperature, in chunks, over a mask."""
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    mask = torch.tensor([True, True, False, True, True])
    divergence_sum(student, teacher, mask, 2.0, 0, 2, True).backward()
    found, student.grad = student.grad, None
    log_q, log_p = torch.log_softmax(student / 2, -1), torch.log_softmax(teacher / 2, -1)
    (log_q.exp() * (log_q - log_p)).sum(-1)[mask].sum().backward()
    assert found is not None
    assert torch.allclose(found, student.grad, atol=1e-6)  # type: ignore[arg-type]


# --- who sees what ---------------------------------------------------------------------------------------------------


def row(question: str, answer: str) -> dict[str, Any]:
    said = (("system", "s"), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in said]}


ROWS = [row("abc", "x"), row("defgh", "yz"), row("i", "wvu"), row("jk", "t")]


def test_the_demonstration_is_in_the_teachers_prompt_alone() -> None:
    shown = with_demonstration(ROWS[0]["messages"], CLOSING)
    assert [message["role"] for message in shown] == ["system", "user"]
    assert shown[1]["content"] == (
        "abc\n\nThis is an example for a response to the question:\nx\n\n"
        "Now answer with a response of your own, including the thinking process."
    )
    assert with_demonstration(ROWS[0]["messages"], "")[1]["content"].endswith("question:\nx")
    assert ROWS[0]["messages"][1]["content"] == "abc"


class StudentContext(ModelContext):
    """Encodes prompts by characters; token 0 ends an answer."""

    def encode_prompts(self, prompts: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        return [CharacterTemplate().encode({"messages": prompt})["input_ids"] for prompt in prompts]


def begun(folder: Path, **settings: Any) -> tuple[Sdft, StudentContext, Any]:
    """A second task whose student is away from the base model."""
    stage_adapter(folder)
    model = continued(folder)
    ctx, method = StudentContext(model), sdft(**{"max_new_tokens": 6, **settings})
    ctx.rows = ROWS
    method.train_begin(ctx)
    return method, ctx, model


def micro_batches(sizes: Sequence[int] = (2, 2)) -> list[dict[str, Any]]:
    numbers = iter("0123")
    return [{"input_ids": None, "labels": None, "channel": [next(numbers) for _ in range(n)]} for n in sizes]


def losses(method: Sdft, ctx: StudentContext, model: Any, batches: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    found = []
    for batch in batches:
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        term = method.loss(ctx, model, batch, torch.zeros(()), outputs)
        assert term is not None
        found.append(term)
    return found


def test_the_rows_are_those_of_the_task_by_their_numbers() -> None:
    ctx = StudentContext()
    mixed = sdft().prepare_task(ctx, ROWS)
    assert [r["channel"] for r in mixed] == ["0", "1", "2", "3"]
    assert [r["messages"] for r in mixed] == [r["messages"] for r in ROWS]
    with pytest.raises(UserError, match="row 1 of task 'now' ends without an answer"):
        sdft().prepare_task(ctx, [ROWS[0], {"messages": ROWS[1]["messages"][:2]}])
    with pytest.raises(UserError, match="generates text, but row 0 of task 'now' has images"):
        sdft().prepare_task(ctx, [{**ROWS[0], "images": ["a.png"]}])


@pytest.mark.parametrize("skip", [0, 2, 9])
def test_the_students_answers_take_the_place_of_the_given_ones(tmp_path: Path, skip: int) -> None:
    method, ctx, model = begun(tmp_path, skip_tokens=skip)
    batches = micro_batches()
    method.window(ctx, batches)
    count = 0
    for batch in batches:
        for ids, labels, mask, number in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], batch["channel"], strict=True
        ):
            (prompt,) = ctx.encode_prompts([ROWS[int(number)]["messages"][:2]])
            own = ids[mask.bool()].tolist()
            assert own[: len(prompt)] == prompt, "the student sees the question without the demonstration"
            answer = own[len(prompt) :]
            assert 1 <= len(answer) <= 6
            trained = (labels != -100).nonzero().flatten().tolist()
            assert trained == list(range(len(prompt) + min(skip, len(answer) - 1), len(own)))
            assert [int(labels[i]) for i in trained] == [own[i] for i in trained]
            count += len(trained)
    assert method._window_count is not None
    assert int(method._window_count) == count
    assert model.training
    again = micro_batches((4,))
    method.window(ctx, again)
    one = [
        ids[mask.bool()].tolist()
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    other = [
        ids[mask.bool()].tolist() for ids, mask in zip(again[0]["input_ids"], again[0]["attention_mask"], strict=True)
    ]
    assert one == other, "the answers depend on how the step is cut into micro-batches"
    ctx.step = 1
    method.window(ctx, again)
    assert one != [
        ids[m.bool()].tolist() for ids, m in zip(again[0]["input_ids"], again[0]["attention_mask"], strict=True)
    ]


class EvaluatingContext(StudentContext):
    """Switches dropout off for statistics, as the session does."""

    inside = False

    @contextmanager
    def statistics_mode(self) -> Iterator[None]:
        assert self.model is not None
        self.model.eval()
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            self.model.train()


def with_dropout(folder: Path, **settings: Any) -> tuple[Sdft, EvaluatingContext, Any]:
    stage_adapter(folder, lora_dropout=0.5)
    model = continued(folder)
    ctx, method = EvaluatingContext(model), sdft(**{"max_new_tokens": 6, **settings})
    ctx.rows = ROWS
    method.train_begin(ctx)
    return method, ctx, model


def test_without_temperature_the_student_says_what_is_likeliest(tmp_path: Path) -> None:
    """And without dropout, though it is in training, under its autocast. Token by token, until token 0 or six tokens
    are there."""
    method, ctx, model = with_dropout(tmp_path, temperature=0.0)
    batches = micro_batches((4,))
    seen: list[bool] = []
    watch = model.get_base_model().register_forward_pre_hook(lambda *_: seen.append(ctx.inside))
    method.window(ctx, batches)
    watch.remove()
    assert seen
    assert all(seen)
    model.eval()
    cut = 0
    for place, original in enumerate(ROWS):
        (prompt,) = ctx.encode_prompts([original["messages"][:2]])
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] != 0):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert batches[0]["input_ids"][place][batches[0]["attention_mask"][place].bool()].tolist() == ids
        cut += ids[-1] != 0
    assert ctx.logged["sdft_cut_off"] == pytest.approx(cut / 4)


def test_the_teacher_drops_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a demonstration it is the student without dropout."""
    monkeypatch.setattr(module, "with_demonstration", lambda messages, closing: messages[:-1])
    for teacher in ("live", "ema"):
        method, ctx, model = with_dropout(tmp_path / teacher, teacher=teacher)
        batches = micro_batches()
        method.window(ctx, batches)
        outputs = []
        with ctx.statistics_mode():
            outputs = [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]) for b in batches]
        terms = [
            method.loss(ctx, model, b, torch.zeros(()), o)  # the model is back in training
            for b, o in zip(batches, outputs, strict=True)
        ]
        assert all(term is not None and abs(float(term.detach())) < 1e-6 for term in terms)


def test_the_teachers_positions_do_not_count_the_padding_in_front(tmp_path: Path) -> None:
    """A model of relative positions cannot tell; one of absolute positions can."""
    method, ctx, model = begun(tmp_path, teacher="live")
    batches = micro_batches((4,))
    method.window(ctx, batches)
    inputs = batches[0]
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    seen: list[dict[str, Any]] = []
    inner = model.get_base_model().model
    inner.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    method.loss(ctx, model, inputs, torch.zeros(()), outputs)
    (given,) = seen
    masks = given["attention_mask"].bool()
    assert not masks[0, 0], "the prompts have one length"
    for positions, mask in zip(given["position_ids"], masks, strict=True):
        assert positions[mask].tolist() == list(range(int(mask.sum())))


def test_the_share_of_answers_that_were_cut_off(tmp_path: Path) -> None:
    """One token is the end or is cut off: of four answers as many as end in another token than 0, or in one of all."""
    method, ctx, _ = begun(tmp_path, max_new_tokens=1)
    batches = micro_batches((4,))
    method.window(ctx, batches)
    ends = batches[0]["attention_mask"].sum(dim=1) - 1
    last = batches[0]["input_ids"][torch.arange(4), ends].tolist()
    assert ctx.logged["sdft_cut_off"] == pytest.approx(sum(token != 0 for token in last) / 4)
    ctx.stop_tokens = list(range(64))
    method.window(ctx, micro_batches((4,)))
    assert ctx.logged["sdft_cut_off"] == 0


def test_rows_of_one_question_get_answers_of_their_own(tmp_path: Path) -> None:
    method, ctx, _ = begun(tmp_path)
    ctx.rows = [row("abc", "x")] * 4
    batches = micro_batches((4,))
    method.window(ctx, batches)
    assert len({tuple(ids[ids != 0].tolist()) for ids in batches[0]["input_ids"]}) > 1


def test_the_closing_line_is_the_users(tmp_path: Path) -> None:
    method, ctx, _ = begun(tmp_path, closing="Go.")
    method.window(ctx, micro_batches((4,)))
    ((shown, _),) = method._waiting
    assert shown == ctx.encode_prompts([with_demonstration(one["messages"], "Go.") for one in ROWS])


def test_gen_batch_is_the_number_of_answers_at_a_time(tmp_path: Path) -> None:
    method, ctx, model = begun(tmp_path, gen_batch=3)
    sizes = set()
    base = model.get_base_model()
    base.register_forward_pre_hook(lambda _, args, given: sizes.add(len(given["input_ids"])), with_kwargs=True)
    method.window(ctx, micro_batches((4,)))
    assert sizes == {3, 1}


def test_the_logged_divergence_is_the_mean_over_tokens(tmp_path: Path) -> None:
    """In one micro-batch it is the loss."""
    method, ctx, model = begun(tmp_path)
    batches = micro_batches((4,))
    method.window(ctx, batches)
    (loss,) = losses(method, ctx, model, batches)
    assert ctx.logged["sdft_kl"] == pytest.approx(float(loss.detach()))


def test_rows_are_not_joined() -> None:
    assert sdft().required_flags() == {"padding_free": "false"}


@pytest.mark.parametrize("teacher", ["live", "ema"])
@pytest.mark.parametrize("skip", [0, 1])
def test_a_teacher_without_a_demonstration_teaches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str, skip: int
) -> None:
    """Then it is the student: every position must meet its own, in whatever padding."""
    monkeypatch.setattr(module, "with_demonstration", lambda messages, closing: messages[:-1])
    method, ctx, model = begun(tmp_path, teacher=teacher, skip_tokens=skip)
    batches = micro_batches()
    method.window(ctx, batches)
    total = sum(losses(method, ctx, model, batches))
    assert abs(float(total)) < 1e-6
    total.backward()  # type: ignore[union-attr]
    assert max(float(p.grad.abs().max()) for p in ctx.parameters.values() if p.grad is not None) < 1e-5


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
@pytest.mark.parametrize("teacher", ["base", "live", "ema"])
def test_the_loss_by_hand(tmp_path: Path, divergence: str, teacher: str) -> None:
    """A row at a time, without padding: the mean over all tokens of the step, from the right teacher."""
    method, ctx, model = begun(tmp_path, divergence=divergence, teacher=teacher)
    old = {name: weight.clone() for name, weight in ctx.weights().items()}
    with torch.no_grad():
        for parameter in ctx.parameters.values():
            parameter += 0.2
    if teacher == "ema":
        method.after_step(ctx)
    batches = micro_batches()
    method.window(ctx, batches)
    found = sum(losses(method, ctx, model, batches))
    moved = {name: parameter.detach().clone() for name, parameter in ctx.parameters.items()}
    total, count = 0.0, 0
    for number, original in enumerate(ROWS):
        batch, place = batches[number // 2], number % 2
        prompt, shown = ctx.encode_prompts(
            [original["messages"][:2], with_demonstration(original["messages"], CLOSING)]
        )
        answer = batch["input_ids"][place][batch["attention_mask"][place].bool()].tolist()[len(prompt) :]
        with torch.no_grad():
            student = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            if teacher == "ema":
                for name, parameter in ctx.parameters.items():
                    parameter.copy_(0.99 * old[name] + 0.01 * moved[name])
            names = () if teacher == "base" else ("default",)
            with AdapterSwitch(model).active(*names):
                other = model(input_ids=torch.tensor([shown + answer])).logits[0, len(shown) - 1 : -1]
            for name, parameter in ctx.parameters.items():
                parameter.copy_(moved[name])
        log_q, log_p = student.log_softmax(-1), other.log_softmax(-1)
        if divergence == "forward":
            log_q, log_p = log_p, log_q
        total += float((log_q.exp() * (log_q - log_p)).sum())
        count += len(answer)
    assert float(found) == pytest.approx(total / count, rel=1e-4)


def test_the_average_is_kept_with_a_checkpoint(tmp_path: Path) -> None:
    method, ctx, _ = begun(tmp_path, ema=0.25)
    before = {name: weight.clone() for name, weight in ctx.weights().items()}
    with torch.no_grad():
        for parameter in ctx.parameters.values():
            parameter += 1
    method.after_step(ctx)
    state = method.checkpoint_state(ctx)
    assert state is not None
    other, again, _ = begun(tmp_path, ema=0.25)
    other.restore_checkpoint(again, state)
    for name, weight in before.items():
        assert torch.allclose(other._average[name], weight + 0.25, atol=1e-6), name
    assert sdft(teacher="base").checkpoint_state(ctx) is None


def test_only_the_student_learns(tmp_path: Path) -> None:
    method, ctx, model = begun(tmp_path)
    batches = micro_batches((4,))
    method.window(ctx, batches)
    before = {name: weight.clone() for name, weight in method._average.items()}
    losses(method, ctx, model, batches)[0].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in ctx.parameters.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(torch.equal(method._average[name], weight) for name, weight in before.items())
    assert ctx.logged["sdft_kl"] > 0
    assert 0 <= ctx.logged["sdft_cut_off"] <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema": 0.0}, r"--sdft_ema is 0.0, allowed: a number in \(0, 1\]"),
        ({"teacher": "base", "ema": 0.5}, "--sdft_ema is 0.5, allowed: 0.01, because only --sdft_teacher ema uses it"),
        ({"temperature": -1.0}, "--sdft_temperature is -1.0, allowed: a number >= 0"),
        ({"max_new_tokens": 0}, "--sdft_max_new_tokens is 0, allowed: a whole number >= 1"),
        ({"skip_tokens": -1}, "--sdft_skip_tokens is -1, allowed: a whole number >= 0"),
        ({"gen_batch": 0}, "--sdft_gen_batch is 0, allowed: a whole number >= 1"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sdft(**settings)
