"""ewc against hand-computed numbers (T1 to T7 of its specification), and its checks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift_cl.errors import RunFailure, UserError
from swift_cl.io import MethodState, load_method_state, save_method_state
from swift_cl.methods._draws import permutation
from swift_cl.methods.ewc import Ewc, EwcConfig, sampled_labels
from tests.support.fake_context import FakeContext, FakeGradients


class Weights(nn.Module):
    """A model that is only its weights."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


class KnownFisher(Ewc):
    """ewc with the Fisher given, so that what is done with it can be computed by hand."""

    def __init__(self, config: EwcConfig, values: "tuple[float, ...]" = ()) -> None:
        super().__init__(config)
        self.values = values

    def fisher(self, ctx: Any) -> "tuple[dict[str, Tensor], int, int]":
        return {"w": torch.tensor(self.values)}, 1, 1


def chain(config: EwcConfig, *tasks: "tuple[tuple[float, ...], tuple[float, ...]]") -> MethodState:
    """The state after tasks with these (Fisher, weights)."""
    state: MethodState | None = None
    for number, (fisher, weights) in enumerate(tasks):
        earlier = [f"t{i}" for i in range(number)]
        state = KnownFisher(config, fisher).end_task(FakeContext(Weights(*weights), earlier=earlier, state=state))
    assert state is not None
    return state


def injected(config: EwcConfig, state: MethodState, *weights: float) -> tuple[list[float], float]:
    """(what is added to a zero gradient, logged penalty) at these weights."""
    ctx = FakeContext(Weights(*weights), earlier=["t0"], state=state)
    grads = FakeGradients({"w": torch.zeros(len(weights))})
    method = Ewc(config)
    method.train_begin(ctx)
    method.gradients(ctx, grads)
    return grads["w"].tolist(), ctx.logged["ewc_penalty"]


def test_t1_penalty_and_its_gradient() -> None:
    config = EwcConfig(lambda_=2.0)
    gradient, penalty = injected(config, chain(config, ((1.0, 0.5), (0.0, 0.0))), 1.0, 2.0)
    assert penalty == 3.0  # without the 1/2 it would be 6
    assert gradient == [2.0, 2.0]  # (0, 0) if detached, (4, 4) without the 1/2


class Logistic(nn.Module):
    """Logistic regression as a language model: the logits at position 0 say label 1 with probability sigmoid(w x)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor) -> Any:
        score = x @ self.w
        first = torch.stack((torch.zeros_like(score), score), dim=-1)
        return type("Outputs", (), {"logits": torch.stack((first, torch.zeros_like(first)), dim=1)})


LOGISTIC_ROWS = [
    {"x": [1.0, 0.0], "labels": [-100, 1]},
    {"x": [0.0, 2.0], "labels": [-100, 0]},
    {"x": [1.0, 1.0], "labels": [-100, 1]},
]
TRUE_FISHER = (0.131075, 0.398871)


def measured(model: nn.Module, rows: list[dict[str, Any]], rank: int = 0, world: int = 1, **flags: Any) -> Tensor:
    ctx = FakeContext(model, rank=rank, world_size=world)
    ctx.rows = rows
    fisher, _, _ = Ewc(EwcConfig(**flags)).fisher(ctx)
    return fisher["w"]


def test_t2_empirical_fisher_squares_each_sample() -> None:
    fisher = measured(Logistic(), LOGISTIC_ROWS, fisher="empirical", fisher_norm="sample")
    assert fisher.tolist() == pytest.approx([0.048220, 0.357443], abs=1e-6)
    assert fisher.tolist() != pytest.approx([0.032146, 0.059383], abs=1e-3)  # the squared batch mean


@pytest.mark.usefixtures("bars_at_once")
def test_the_fisher_shows_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    measured(Logistic(), LOGISTIC_ROWS)
    assert "ewc: Fisher: 100%" in (shown := capsys.readouterr().err)
    assert "3/3" in shown


def test_t2_sampled_fisher_is_the_true_one() -> None:
    draws, total = 200_000, torch.zeros(2, dtype=torch.float64)
    for number, (x1, x2) in enumerate(((1.0, 0.0), (0.0, 2.0), (1.0, 1.0))):
        p = 1 / (1 + math.exp(-x1))
        log_p = torch.tensor([math.log(1 - p), math.log(p)]).expand(draws, 2)
        error = (sampled_labels(log_p, seed=number).double() - p).square().mean()
        total += error * torch.tensor([x1, x2], dtype=torch.float64).square() / 3
    assert total.tolist() == pytest.approx(TRUE_FISHER, rel=0.01)


def test_t2_sampled_fisher_through_the_model() -> None:
    fisher = measured(Logistic(), LOGISTIC_ROWS * 200, fisher_norm="sample", fisher_samples=1000)
    # 600 draws: about 5 % standard error; the gold labels would give 0.048 for the first.
    assert fisher.tolist() == pytest.approx(TRUE_FISHER, rel=0.2)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_two_ranks_sum_to_one_rank(fisher: str) -> None:
    rows = LOGISTIC_ROWS * 3  # an odd number: the second rank has one pass that must not count
    parts = [measured(Logistic(), rows, rank=rank, world=2, fisher=fisher) for rank in (0, 1)]
    assert torch.allclose(parts[0] + parts[1], measured(Logistic(), rows, fisher=fisher), rtol=1e-6, atol=0)


class TwinRanks(FakeContext):
    """Two ranks that measure the same: every sum over the ranks is twice what this one has."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(2)


def test_the_ranks_add_up_what_each_has_measured() -> None:
    one = FakeContext(Logistic(), rank=0, world_size=2)
    both = TwinRanks(Logistic(), rank=0, world_size=2)
    one.rows = both.rows = LOGISTIC_ROWS
    method = Ewc(EwcConfig(fisher="empirical"))
    assert method.fisher(both)[0]["w"].tolist() == (2 * method.fisher(one)[0]["w"]).tolist()


class Slopes(nn.Module):
    """At w = 0, log p(1) at position t has gradient slope_t / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, slopes: Tensor) -> Any:
        return type("Outputs", (), {"logits": torch.stack((torch.zeros_like(slopes), slopes * self.w), dim=-1)})


SLOPE_ROWS = [
    {"slopes": [4.0, 9.0], "labels": [-100, 1]},  # 1 answer token, gradient of the sum 2
    {"slopes": [-4.0, -4.0, -4.0, 9.0], "labels": [-100, 1, 1, 1]},  # 3 answer tokens, gradient of the sum -6
]


@pytest.mark.parametrize(("norm", "expected"), [("token", 10.0), ("sample", 20.0), ("mean", 1.0)])
def test_t3_normalisation(norm: str, expected: float) -> None:
    # Gradients of per-token means would give 4, the batch mean 1, whatever the norm.
    assert measured(Slopes(), SLOPE_ROWS, fisher="empirical", fisher_norm=norm).item() == pytest.approx(expected)


def test_t3_the_mean_norm_has_mean_one_over_all_weights() -> None:
    # 0.048220 and 0.357443 (T2) over their mean 0.2028315
    fisher = measured(Logistic(), LOGISTIC_ROWS, fisher="empirical", fisher_norm="mean")
    assert fisher.tolist() == pytest.approx([0.237735, 1.762265], abs=1e-4)


def test_the_fisher_is_measured_without_dropout() -> None:
    class Asked(Slopes):
        def forward(self, slopes: Tensor) -> Any:
            assert ctx.measures
            return super().forward(slopes)

    ctx = FakeContext(Asked())
    ctx.rows = SLOPE_ROWS
    Ewc(EwcConfig()).fisher(ctx)
    assert not ctx.measures


def test_rows_without_an_answer_are_not_counted() -> None:
    rows: list[dict[str, Any]] = [{}, {"slopes": [3.0, 3.0], "labels": [1, -100]}, *SLOPE_ROWS]
    assert measured(Slopes(), rows, fisher="empirical", fisher_norm="sample").item() == pytest.approx(20.0)


def test_the_rows_are_drawn_once_from_the_seed() -> None:
    rows = [{"slopes": [float(i), 0.0], "labels": [-100, 1]} for i in range(1, 41)]

    def few(seed: int) -> float:
        return measured(Slopes(), rows, fisher="empirical", fisher_samples=4, seed=seed).item()

    assert few(1) == few(1)
    assert len({few(seed) for seed in range(5)}) == 5
    assert few(0) != pytest.approx(sum((i / 2) ** 2 for i in range(1, 5)) / 4)  # not simply the first rows


def test_the_sampled_labels_are_drawn_from_the_seed() -> None:
    # All rows are measured, in whatever order, so that only the labels can differ.
    found = {seed: measured(Logistic(), LOGISTIC_ROWS * 4, seed=seed).tolist() for seed in (0, 1, 2)}
    assert measured(Logistic(), LOGISTIC_ROWS * 4, seed=1).tolist() == pytest.approx(found[1])
    assert found[0] != pytest.approx(found[1], rel=1e-3)
    assert found[1] != pytest.approx(found[2], rel=1e-3)


def test_the_state_says_how_much_was_measured_and_does_not_follow_the_weights() -> None:
    model = Slopes()
    ctx = FakeContext(model)
    ctx.rows = SLOPE_ROWS * 3
    state = Ewc(EwcConfig(fisher="empirical", fisher_samples=4)).end_task(ctx)
    labels = [sum(label != -100 for label in row["labels"][1:]) for row in ctx.rows]
    drawn = permutation(6, "ewc", 0)[:4]
    assert state.meta["n_samples"] == 4
    assert state.meta["n_tokens"] == sum(labels[i] for i in drawn)
    with torch.no_grad():
        model.w += 5
    assert state.tensors["anchor/w"].tolist() == [0.0]


THREE_TASKS = (((2.0,), (0.0,)), ((1.0,), (1.0,)), ((4.0,), (3.0,)))


def test_t4_separate_penalties_as_one_quadratic() -> None:
    config = EwcConfig(lambda_=1.0)
    state = chain(config, *THREE_TASKS)
    assert state.tensors["anchor/w"].item() == pytest.approx(13 / 7)
    assert state.meta["offset"] == pytest.approx(12.857143, abs=1e-6)
    gradient, penalty = injected(config, state, 2.0)
    assert gradient == pytest.approx([1.0], abs=1e-6)  # -4 with the last task only
    assert penalty == pytest.approx(6.5, abs=1e-6)  # 2.0 with the last task only; 1.1667 with averaged F, last anchor


def test_t4_online() -> None:
    config = EwcConfig(lambda_=1.0, mode="online", gamma=0.5)
    state = chain(config, *THREE_TASKS)
    assert state.tensors["importance/w"].item() == 5.0
    gradient, penalty = injected(config, state, 2.0)
    assert gradient == [-5.0]
    assert penalty == 2.5


def test_where_nothing_is_known_nothing_is_pulled() -> None:
    config = EwcConfig(lambda_=1.0)
    state = chain(config, ((0.0, 1.0), (1.0, 1.0)), ((0.0, 0.0), (5.0, 5.0)))
    assert state.tensors["anchor/w"].tolist() == [1.0, 1.0]
    assert injected(config, state, 9.0, 2.0)[0] == [0.0, 1.0]


def test_t5_added_once_a_step_whatever_accumulation_and_ranks() -> None:
    config = EwcConfig(lambda_=1.0)
    state = chain(config, ((2.0,), (0.0,)))  # penalty gradient 2 at w = 1
    moves = []
    for rank in (0, 1):
        model = Weights(1.0)
        ctx = FakeContext(model, earlier=["t0"], state=state, rank=rank, world_size=2, num_items=8)
        method = Ewc(config)
        method.train_begin(ctx)
        for _ in range(2):  # two micro-batches
            inputs = {"labels": torch.tensor([[-100, 1, 1]])}
            assert method.loss(ctx, model, inputs, torch.tensor(1.0), None) is None
        grads = FakeGradients({"w": torch.tensor([4.0])})  # cross-entropy, reduced over ranks and micro-batches
        method.gradients(ctx, grads)
        moves.append(grads["w"].item())
    assert moves == [6.0, 6.0]  # 8: not divided by the accumulation; 12: also times the ranks


def test_t6_fp32_whatever_the_weights() -> None:
    config = EwcConfig(lambda_=1.0)
    gradient, _ = injected(config, chain(config, ((1e4,), (0.01,))), 0.01001)
    assert gradient == pytest.approx([0.1], rel=1e-3)
    in_bf16 = 1e4 * (torch.tensor(0.01001).bfloat16() - torch.tensor(0.01).bfloat16())
    assert in_bf16.item() == 0.0  # why this matters


@pytest.mark.parametrize(("strength", "minimiser"), [(1.0, 4.0), (9.0, 2.0), (1e6, 1.000012)])
def test_t7_minimiser_of_loss_and_penalty(strength: float, minimiser: float) -> None:
    config = EwcConfig(lambda_=strength)
    model = Weights(0.0)
    ctx = FakeContext(model, earlier=["t0"], state=chain(config, ((1.0,), (1.0,))))
    method = Ewc(config)
    method.train_begin(ctx)
    for _ in range(50):
        grads = FakeGradients({"w": 3 * (model.w.detach() - 5)})
        method.gradients(ctx, grads)
        with torch.no_grad():
            model.w -= 0.9 / (3 + strength) * grads["w"]
        ctx.step += 1
    assert model.w.item() == pytest.approx(minimiser, abs=2e-6)


def test_first_task_and_lambda_zero_touch_nothing() -> None:
    state = chain(EwcConfig(), ((1.0,), (0.0,)))
    for config, earlier in ((EwcConfig(), []), (EwcConfig(lambda_=0.0), ["t0"])):
        ctx = FakeContext(Weights(1.0), earlier=earlier, state=state)
        grads = FakeGradients({"w": torch.tensor([4.0])})
        method = Ewc(config)
        method.train_begin(ctx)
        method.gradients(ctx, grads)
        assert not grads.written


def test_state_survives_the_disk(tmp_path: Any) -> None:
    config = EwcConfig(lambda_=1.0)
    state = chain(config, *THREE_TASKS)
    save_method_state(tmp_path, "ewc", state)
    assert injected(config, load_method_state(tmp_path, "ewc"), 2.0) == injected(config, state, 2.0)


def test_another_shape_mode_or_norm_is_refused() -> None:
    state = chain(EwcConfig(), ((1.0, 1.0), (0.0, 0.0)))
    with pytest.raises(UserError, match=r"1 differ: w: \[2\] in the state, \[1\] now"):
        Ewc(EwcConfig()).train_begin(FakeContext(Weights(1.0), earlier=["t0"], state=state))
    ctx = FakeContext(Weights(1.0, 2.0), earlier=["t0"], state=state)
    for config, flag in ((EwcConfig(mode="online"), "mode"), (EwcConfig(fisher_norm="mean"), "fisher_norm")):
        with pytest.raises(UserError, match=f"--ewc_{flag} is .* task 't0' was written with"):
            Ewc(config).train_begin(ctx)


def test_a_fisher_that_is_zero_or_not_finite_fails() -> None:
    with pytest.raises(RunFailure, match="Fisher of task 'now' sums to 0"):
        measured(Slopes(), [{"slopes": [0.0, 0.0], "labels": [-100, 1]}])
    with pytest.raises(RunFailure, match="sums to nan"):
        measured(Slopes(), [{"slopes": [math.nan, 0.0], "labels": [-100, 1]}], fisher="empirical")
    with pytest.raises(RunFailure, match="none of the 1 rows"):
        measured(Slopes(), [{}])


@pytest.mark.parametrize(("weight", "word"), [(1e-4, "inert"), (0.1, None), (10.0, "frozen")])
@pytest.mark.parametrize("num_items", [4, None])
def test_guard_after_a_tenth_of_the_steps(weight: float, word: str | None, num_items: int | None) -> None:
    config = EwcConfig(lambda_=2.0)
    model = Weights(weight)
    # Two tasks of half the importance: their parabola's offset is no pull, so the guard leaves it out.
    state = chain(config, ((0.5,), (-1.0,)), ((0.5,), (1.0,)))
    assert state.meta["offset"] == 1.0
    ctx = FakeContext(model, earlier=["t0"], state=state, num_items=num_items)
    method = Ewc(config)
    method.train_begin(ctx)
    inputs = {"labels": torch.tensor([[-100, 1, 1]])}
    for ctx.step in range(30):
        for _ in range(2):  # per-token cross-entropy 1: half of the window's mean, or a mean of its own
            method.loss(ctx, model, inputs, torch.tensor(0.5 if num_items else 1.0), None)
        method.gradients(ctx, FakeGradients({"w": torch.zeros(1)}))
        guards = [message for message in ctx.notices if "cross-entropy" in message]
        assert len(guards) == int(word is not None and ctx.step >= 9)
    if word:
        ratio = weight**2
        assert guards[0].startswith(f"{word}: the penalty is {ratio:.2g} of the cross-entropy after 10 steps")


def test_full_fine_tuning_says_what_it_costs() -> None:
    ctx = FakeContext(Weights(*[0.0] * 4))
    Ewc(EwcConfig()).train_begin(ctx)
    assert ctx.notices == ["full fine-tuning: importance and anchor of 4 parameters take 2.98e-08 GiB more"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lambda_": -1.0}, "--ewc_lambda is -1.0, allowed: a number >= 0"),
        ({"lambda_": math.nan}, "--ewc_lambda is nan"),
        ({"gamma": 0.0, "mode": "online"}, r"--ewc_gamma is 0.0, allowed: a number in \(0, 1\]"),
        ({"gamma": 1.5, "mode": "online"}, r"--ewc_gamma is 1.5, allowed: a number in \(0, 1\]"),
        ({"gamma": 0.5}, "--ewc_gamma is 0.5, allowed: only with --ewc_mode online"),
        ({"fisher_samples": 0}, "--ewc_fisher_samples is 0, allowed: a whole number >= 1"),
    ],
)
def test_values_out_of_range(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EwcConfig(**flags).validate()
    EwcConfig().validate()
