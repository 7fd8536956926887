"""lwf against hand-computed numbers (T1 to T6 of its specification), its teacher, and its checks."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift_cl.errors import RunFailure, UserError
from swift_cl.methods._distillation import divergence_sum
from swift_cl.methods.lwf import Lwf, LwfConfig
from tests.support.fake_context import FakeContext


class Table(nn.Module):
    """A model whose logits are its weights: `z` is [length, vocabulary], the same for every row."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter(z.clone())

    def forward(self, input_ids: Tensor, **other: Any) -> Any:
        return SimpleNamespace(logits=self.z.repeat(len(input_ids), 1, 1))


class Ranked(FakeContext):
    """Scales like the Trainer on several ranks, and refuses collectives: there must be none in the loss."""

    def token_mean(self, total: Tensor, count: Tensor | int) -> Tensor:
        return super().token_mean(total, count) * self.world_size

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        raise AssertionError("a collective in the loss")


def taught(
    teacher: Tensor, student: Tensor, config: LwfConfig | None = None, **context: Any
) -> tuple[Lwf, FakeContext, Table]:
    """A later task (full fine-tuning) whose live weights have moved from `teacher` to `student`."""
    model = Table(teacher)
    ctx = Ranked(model, earlier=["t0"], **context)
    method = Lwf(config or LwfConfig())
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    with torch.no_grad():
        model.z.copy_(student)
    return method, ctx, model


def term(method: Lwf, ctx: FakeContext, model: nn.Module, labels: list[list[int]], **more: Any) -> Tensor:
    inputs = {"input_ids": torch.zeros(len(labels), len(labels[0]), dtype=torch.long), **more}
    found = method.loss(ctx, model, {**inputs, "labels": torch.tensor(labels)}, torch.tensor(0.0), model(**inputs))
    assert found is not None
    return found


@pytest.mark.parametrize(("t2", "value", "gradient"), [(False, 0.110944, 0.115529), (True, 0.443776, 0.462117)])
def test_t1_divergence_and_gradient(t2: bool, value: float, gradient: float) -> None:
    teacher, student = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    method, ctx, model = taught(teacher, student, LwfConfig(t2_scaling=t2), num_items=1)
    found = term(method, ctx, model, [[-100, 1]])
    found.backward()
    assert found.item() == pytest.approx(value, abs=1e-6)
    assert found.item() != pytest.approx(0.120115, abs=1e-4)  # the reversed direction
    assert model.z.grad is not None
    assert model.z.grad[0].tolist() == pytest.approx([-gradient, gradient], abs=1e-6)
    assert model.z.grad[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("world", [1, 2])
def test_t2_total_gradient_on_one_and_two_ranks(world: int) -> None:
    """The same token on every rank. Gradients are averaged over ranks, as DDP does."""
    teacher, student = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    gradients = []
    for rank in range(world):
        method, ctx, model = taught(teacher, student, num_items=world, rank=rank, world_size=world)
        distilled = term(method, ctx, model, [[-100, 1]])
        cross_entropy = -torch.log_softmax(model.z[0], dim=-1)[1]  # x ranks / tokens of all ranks
        (cross_entropy + distilled).backward()
        assert model.z.grad is not None
        gradients.append(model.z.grad[0])
    assert torch.stack(gradients).mean(dim=0).tolist() == pytest.approx([0.384471, -0.384471], abs=1e-6)


@pytest.mark.parametrize(("index", "expected"), [(0, 0.0), (1, 0.055472), (2, 0.055472), (3, 0.0)])
def test_t3_only_predictions_of_labels_count(index: int, expected: float) -> None:
    teacher = torch.zeros(4, 2)
    teacher[index, 0] = 2.0
    method, ctx, model = taught(teacher, torch.zeros(4, 2), num_items=2)
    # An unshifted mask would give 0, 0, 0.055472, 0.055472.
    assert term(method, ctx, model, [[-100, -100, 0, 1]]).item() == pytest.approx(expected, abs=1e-6)


def logit_with_divergence(wanted: float) -> float:
    """a such that KL(softmax(a, 0) || uniform) = wanted, by bisection."""
    low, high = 0.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        p = 1 / (1 + math.exp(-middle))
        divergence = math.log(2) + p * math.log(p) + (1 - p) * math.log1p(-p) if p < 1 else math.log(2)
        low, high = (middle, high) if divergence < wanted else (low, middle)
    return low


def test_t4_mean_over_all_tokens_of_the_window() -> None:
    total = 0.0
    for divergences in ((0.4,), (0.1, 0.2, 0.3)):
        teacher = torch.zeros(len(divergences) + 1, 2)
        teacher[:-1, 0] = torch.tensor([logit_with_divergence(value) for value in divergences])
        config = LwfConfig(temperature=1.0)
        method, ctx, model = taught(teacher, torch.zeros_like(teacher), config, num_items=4)
        total += term(method, ctx, model, [[-100] + [1] * len(divergences)]).item()
    assert total == pytest.approx(0.25, abs=1e-6)  # mean of means 0.3, sum over tokens by row 0.5


def test_without_a_window_count_it_is_the_mean_of_the_micro_batch() -> None:
    teacher = torch.zeros(4, 2)
    teacher[:3, 0] = torch.tensor([logit_with_divergence(value) for value in (0.1, 0.2, 0.3)])
    method, ctx, model = taught(teacher, torch.zeros(4, 2), LwfConfig(temperature=1.0, lambda_=3.0))
    assert term(method, ctx, model, [[-100, 1, 1, 1]]).item() == pytest.approx(0.6, abs=1e-6)
    assert ctx.logged["lwf_kl"] == pytest.approx(0.2, abs=1e-6)
    assert ctx.log_weights["lwf_kl"] == 3


def naive(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (torch.softmax(z / temperature, dim=-1) for z in (teacher, student))
    return (p * (p.log() - q.log())).sum(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_fp32_over_a_large_vocabulary(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 50_000, generator=random).mul(3).to(dtype)
    everywhere = torch.ones(4, dtype=torch.bool)
    assert abs(divergence_sum(teacher.clone(), teacher, everywhere, 2.0, 0, 512).item()) < 4e-6
    student = (teacher.float() + 0.1 * torch.randn(4, 50_000, generator=random)).to(dtype)
    exact = naive(student.double(), teacher.double(), 2.0)
    found = torch.stack(
        [divergence_sum(student[i : i + 1], teacher[i : i + 1], everywhere[:1], 2.0, 0, 1) for i in range(4)]
    )
    # Log-probabilities are about -11, where fp32 steps are 1e-6: how they round depends on the processor.
    assert (found - exact).abs().max() < 2e-6
    in_bf16 = naive(student.bfloat16(), teacher.bfloat16(), 2.0)
    assert (in_bf16.double() - exact).abs().max() > 1e-4  # why it must not be used


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("top_k", [0, 2, 5, 11, 99])
def test_gradient_and_chunks_against_autograd(chunk: int, top_k: int) -> None:
    random = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(7, 11, generator=random).mul(2) for _ in range(2))
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    reference = student.double().requires_grad_()
    p, q = (torch.softmax(z / 1.7, dim=-1) for z in (teacher.double(), reference))
    if 0 < top_k < 11:
        kept = p.topk(top_k, dim=-1).indices
        p, q = (torch.cat((x.gather(-1, kept), 1 - x.gather(-1, kept).sum(-1, keepdim=True)), -1) for x in (p, q))
    expected = (p * (p.log() - q.log())).sum(-1)[mask].sum()
    expected.backward()

    student[1] = teacher[4] = math.nan  # outside the mask nothing may matter
    student.requires_grad_()
    found = divergence_sum(student, teacher, mask, 1.7, top_k, chunk)
    (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert student.grad is not None
    assert reference.grad is not None
    assert torch.allclose(student.grad.double(), 3 * reference.grad, atol=1e-6)


def test_no_answer_in_a_micro_batch_gives_a_zero_that_backward_accepts() -> None:
    method, ctx, model = taught(torch.ones(3, 2), torch.zeros(3, 2))
    found = term(method, ctx, model, [[-100, -100, -100]])
    found.backward()
    assert found.item() == 0.0
    assert ctx.logged["lwf_kl"] == 0.0
    assert model.z.grad is not None
    assert not model.z.grad.any()


class Window(FakeContext):
    """Adds what another rank counted."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor + 10


def distilling_all(teacher: Tensor) -> tuple[Lwf, Window, Table]:
    """All tokens from these logits of the model before, by a student whose logits are 0."""
    model = Table(teacher)
    ctx = Window(model, earlier=["t0"])
    method = Lwf(LwfConfig(tokens="all", temperature=1.0))
    method.prepare_model(ctx, model)
    with torch.no_grad():
        model.z.zero_()
    return method, ctx, model


def test_all_tokens_skip_padding_and_the_seams_of_packed_rows() -> None:
    teacher = torch.zeros(6, 2)
    teacher[:, 0] = torch.tensor([logit_with_divergence(0.1 * (i + 1)) for i in range(6)])
    method, ctx, model = distilling_all(teacher)
    labels = [[-100, -100, -100, -100, -100, 1]]
    cases: list[tuple[dict[str, Tensor], list[int]]] = [
        ({}, [0, 1, 2, 3, 4]),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}, [0, 1, 2]),
        ({"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}, [2, 3, 4]),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, [0, 1, 2, 3, 4]),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, [0, 1, 3, 4]),
        ({"position_ids": torch.tensor([[[0, 1, 2, 0, 1, 2]]] * 3)}, [0, 1, 3, 4]),  # of a model that sees images
        ({"position_ids": torch.arange(3)}, [0, 1, 2, 3, 4]),
    ]
    for more, positions in cases:
        method.window(ctx, [{"labels": torch.tensor(labels), **more}])
        found = term(method, ctx, model, labels, **more)
        expected = sum(0.1 * (i + 1) for i in positions) / (len(positions) + 10)
        assert found.item() == pytest.approx(expected, abs=1e-6), more


def test_all_micro_batches_are_one_window() -> None:
    """Five and three predicted tokens here, ten on another rank."""
    teacher = torch.zeros(6, 2)
    teacher[:, 0] = logit_with_divergence(0.1)
    method, ctx, model = distilling_all(teacher)
    labels = [[-100, -100, -100, -100, -100, 1]]
    short = {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}
    method.window(ctx, [{"labels": torch.tensor(labels)}, {"labels": torch.tensor(labels), **short}])
    assert term(method, ctx, model, labels).item() == pytest.approx(5 * 0.1 / 18, abs=1e-6)
    assert term(method, ctx, model, labels, **short).item() == pytest.approx(3 * 0.1 / 18, abs=1e-6)


def test_a_window_of_single_tokens_has_nothing_to_predict() -> None:
    model = Table(torch.ones(1, 2))
    ctx = FakeContext(model, earlier=["t0"])
    method = Lwf(LwfConfig(tokens="all"))
    method.prepare_model(ctx, model)
    method.window(ctx, [{"labels": torch.tensor([[1]])}])
    assert term(method, ctx, model, [[1]]).item() == 0.0


def test_all_tokens_of_an_encoder_decoder_are_those_of_its_answer() -> None:
    """Logit t predicts label t there, and its inputs are no part of the logits."""
    model = Table(torch.zeros(3, 2))
    model.config = SimpleNamespace(is_encoder_decoder=True)  # type: ignore[assignment]
    for tokens in ("all", "answer"):
        method = Lwf(LwfConfig(tokens=tokens))
        found = method._positions(FakeContext(model), {"labels": torch.tensor([[1, 0, 1], [1, -100, -100]])})
        assert found.tolist() == [[True, True, True], [True, False, False]]


def test_the_top_k_and_one_bucket_for_the_rest() -> None:
    """Teacher (.5, .25, .2, .05), student uniform; the top two: .5 ln(.5 / .25) + .25 ln 1 + .25 ln(.25 / .5)."""
    teacher = torch.zeros(2, 4)
    teacher[0] = torch.tensor([0.5, 0.25, 0.2, 0.05]).log()
    config = LwfConfig(temperature=1.0, top_k=2)
    method, ctx, model = taught(teacher, torch.zeros(2, 4), config, num_items=1)
    found = term(method, ctx, model, [[-100, 1]]).item()
    assert found == pytest.approx(0.25 * math.log(2), abs=1e-6)  # all four give 0.221473


def test_so_many_positions_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recorded(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float, top_k: int, chunk: int) -> Tensor:
        seen.append(chunk)
        return student.sum()

    method, ctx, model = taught(torch.ones(2, 2), torch.zeros(2, 2), LwfConfig(chunk_tokens=7))
    monkeypatch.setattr("swift_cl.methods._distillation.divergence_sum", recorded)
    term(method, ctx, model, [[-100, 1]])
    assert seen == [7]


# --- the check before the first step ---------------------------------------------------------------------------------


def check(rows: list[dict[str, list[int]]], teacher: Tensor, student: Tensor) -> None:
    """Begin a task whose weights are not those that were loaded."""
    model = Table(teacher)
    ctx = FakeContext(model, earlier=["t0"])
    ctx.rows = rows  # type: ignore[assignment]
    method = Lwf(LwfConfig())
    method.prepare_model(ctx, model)
    with torch.no_grad():
        model.z.copy_(student)
    method.train_begin(ctx)


def test_the_check_says_how_far_a_token_is_off() -> None:
    """Two tokens with the divergence of T1 each, after rows that the template drops."""
    teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    row = {"input_ids": [0, 0, 0], "labels": [-100, 1, 1]}
    with pytest.raises(RunFailure, match=r"divergence from the previous model is 0\.111 per token"):
        check([{}] * 5 + [row], teacher, torch.zeros(3, 2))


def test_a_row_without_an_answer_says_nothing() -> None:
    check([{"input_ids": [0, 0], "labels": [-100, -100]}], torch.ones(2, 2), torch.zeros(2, 2))


def test_weights_that_are_not_finite_fail_the_check() -> None:
    row = {"input_ids": [0, 0], "labels": [-100, 1]}
    with pytest.raises(RunFailure, match="is nan per token"):
        check([row], torch.ones(2, 2), torch.full((2, 2), math.nan))


class Unlabelled(Table):
    """Takes no labels: a loss of its own would cost time, and with them it may return no logits."""

    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids)


def test_no_forward_is_told_the_labels() -> None:
    model = Unlabelled(torch.ones(2, 2))
    ctx = FakeContext(model, earlier=["t0"])
    ctx.rows = [{"input_ids": [0, 0], "labels": [-100, 1]}]
    method = Lwf(LwfConfig())
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    assert term(method, ctx, model, [[-100, 1]]).item() == 0.0


def test_the_copy_has_the_dtype_that_the_engine_trains_in() -> None:
    model = Table(torch.ones(2, 2))
    ctx = FakeContext(model, earlier=["t0"])
    method = Lwf(LwfConfig())
    method.prepare_model(ctx, model)
    model.to(torch.bfloat16)
    method.train_begin(ctx)
    assert ctx.notices == [f"full fine-tuning: the teacher takes {8 / 2**30:.3g} GiB more"]  # four numbers of bf16


def test_all_logits_are_computed_where_all_are_distilled() -> None:
    assert Lwf(LwfConfig(tokens="all")).required_flags() == {"use_logits_to_keep": "false"}
    assert Lwf(LwfConfig()).required_flags() == {}
    method, ctx, model = taught(torch.zeros(2, 2), torch.zeros(2, 2), num_items=1)
    assert term(method, ctx, model, [[-100, 1]], logits_to_keep=2).item() == 0.0


def test_all_tokens_need_all_logits() -> None:
    method, ctx, model = taught(torch.zeros(2, 2), torch.zeros(2, 2))
    method.config.tokens = "all"
    with pytest.raises(UserError, match="add --use_logits_to_keep false"):
        term(method, ctx, model, [[-100, 1]], logits_to_keep=2)


def test_missing_logits_or_another_vocabulary_are_refused() -> None:
    method, ctx, model = taught(torch.zeros(2, 2), torch.zeros(2, 2))
    labels = torch.tensor([[-100, 1]])
    inputs = {"input_ids": labels, "labels": labels}
    for logits, message in (
        (None, "needs the model's logits at every label, found none"),
        (torch.zeros(1, 1, 2), r"found \(1, 1\) for labels \(1, 2\)"),
        (torch.zeros(1, 2, 3), r"teacher's logits are \(1, 2, 2\) and the student's \(1, 2, 3\)"),
    ):
        with pytest.raises(UserError, match=message):
            method.loss(ctx, model, inputs, torch.tensor(0.0), SimpleNamespace(logits=logits))


def test_first_task_and_lambda_zero_add_nothing() -> None:
    for config, earlier in ((LwfConfig(), []), (LwfConfig(lambda_=0.0), ["t0"])):
        model = Table(torch.zeros(2, 2))
        ctx = FakeContext(model, earlier=earlier)
        method = Lwf(config)
        assert method.prepare_model(ctx, model) is model
        method.train_begin(ctx)
        assert method.loss(ctx, model, {}, torch.tensor(0.0), None) is None
        assert method.checkpoint_state(ctx) is None
        assert method.end_task(ctx).meta == {"teacher": None, "teacher_sha256": None}


def test_the_teacher_of_full_fine_tuning_stays_outside_the_model() -> None:
    method, ctx, model = taught(torch.ones(2, 2), torch.zeros(2, 2))
    term(method, ctx, model, [[-100, 1]])
    assert [name for name, _ in model.named_parameters()] == ["z"]
    assert not model.z.any()
    assert model.z.requires_grad
    assert ctx.notices == [f"full fine-tuning: the teacher takes {16 / 2**30:.3g} GiB more"]  # four numbers of fp32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lambda_": -0.5}, "--lwf_lambda is -0.5, allowed: a number >= 0"),
        ({"temperature": 0.0}, "--lwf_temperature is 0.0, allowed: a number > 0"),
        ({"top_k": 1}, "--lwf_top_k is 1, allowed: 0 or a whole number >= 2"),
        ({"chunk_tokens": 0}, "--lwf_chunk_tokens is 0, allowed: a whole number >= 1"),
    ],
)
def test_values_out_of_range(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LwfConfig(**flags).validate()
    LwfConfig().validate()
    LwfConfig(lambda_=0.0).validate()
