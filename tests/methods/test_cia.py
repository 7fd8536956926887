"""cia against hand-computed numbers (T1 to T6 of its specification: the dynamic average), and its checks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift_cl.errors import UserError
from swift_cl.io import MethodState, load_method_state, save_method_state
from swift_cl.methods.cia import Cia, CiaConfig
from tests.support.fake_context import FakeContext, FakeGradients

Pair = tuple[float, float]


class Weights(nn.Module):
    """Two tensors, so that one beta a tensor differs from one beta for all."""

    def __init__(self, w: Tensor, v: Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        if v is not None:
            self.v = nn.Parameter(v.clone())


def begun(method: Cia, model: nn.Module, rank: int = 0) -> FakeContext:
    """A second task whose training begins at the model's weights."""
    before = Cia(CiaConfig()).end_task(FakeContext(model))
    ctx = FakeContext(model, earlier=["t0"], state=before, rank=rank)
    method.train_begin(ctx)
    return ctx


def step(method: Cia, ctx: FakeContext, gradients: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """One optimizer step: the gradients, then the weights it led to."""
    grads = FakeGradients(gradients)
    method.gradients(ctx, grads)
    assert not grads.written
    with torch.no_grad():
        for name, value in weights.items():
            ctx.parameters[name].copy_(value)
    ctx.step += 1
    method.after_step(ctx)


def average(method: Cia, ctx: FakeContext) -> dict[str, Tensor]:
    return method.export(ctx, ctx.weights())


def second_step(config: CiaConfig, th_before: Pair, th: Pair, ema: Pair, g: Pair, g_before: Pair) -> list[float]:
    """theta* after a step from this state. The first step has no earlier gradient and takes beta 0.99, so the weights
    at the beginning are chosen such that it leaves theta* at `ema`."""
    start = (torch.tensor(ema, dtype=torch.float64) - 0.01 * torch.tensor(th_before, dtype=torch.float64)) / 0.99
    method = Cia(config)
    ctx = begun(method, Weights(start.float()))
    step(method, ctx, {"w": torch.tensor(g_before)}, {"w": torch.tensor(th_before)})
    assert average(method, ctx)["w"].tolist() == pytest.approx(ema, abs=1e-6)
    step(method, ctx, {"w": torch.tensor(g)}, {"w": torch.tensor(th)})
    return average(method, ctx)["w"].tolist()


# theta_{t-1}, theta_t, theta*_{t-1}, g_t, g_{t-1}
T1: "tuple[Pair, ...]" = ((1.0, 1.0), (1.1, 0.8), (0.0, 0.2), (0.5, -0.25), (0.1, 0.15))
T2: "tuple[Pair, ...]" = (*T1[:2], (0.9, 1.0), *T1[3:])
T3: "tuple[Pair, ...]" = ((4.0, 4.0), (4.1, 3.8), (0.0, 0.0), (2.0, -1.0), (-1.0, 1.0))


def test_t1_paper() -> None:
    found = second_step(CiaConfig(variant="paper"), *T1)
    assert found == pytest.approx([0.675368, 0.568382], abs=1e-5)
    assert found != pytest.approx([0.424632, 0.431618], abs=1e-3)  # beta on the wrong side


def test_t1_released_falls_back() -> None:
    # alpha = 2.5735 is no weight, so it is 0.01.
    assert second_step(CiaConfig(), *T1) == pytest.approx([0.011, 0.206], abs=1e-5)


def test_t1_released_with_another_scale() -> None:
    # The constant 0.01 that another version of the code hides in place of 2 makes alpha = 0.012868 usable.
    assert second_step(CiaConfig(scale=0.01), *T1) == pytest.approx([0.014154, 0.207721], abs=1e-5)


def test_t2_a_beta_above_one_falls_back() -> None:
    found = second_step(CiaConfig(variant="paper"), *T2)
    assert found == pytest.approx([0.902, 0.998], abs=1e-5)


@pytest.mark.parametrize(("variant", "before", "expected"), [("released", 0.0, 1.0), ("paper", 2.0, 1.5)])
def test_the_borders_of_the_interval_fall_back(variant: str, before: float, expected: float) -> None:
    """The released weight of the new weights is (3 + 1) / (2 * 2) = 1, and the paper's beta is 0 where a step moved
    nothing: both would replace the average by the weights, 2. The fallback 1/2 takes half of the way instead: from 0
    to 1, and from 1, where the first step's fallback led to, to 1.5."""
    method = Cia(CiaConfig(variant=variant, scale=1.0, beta_fallback=0.5))
    ctx = begun(method, Weights(torch.zeros(1)))
    step(method, ctx, {"w": torch.tensor([1.0])}, {"w": torch.tensor([before])})
    step(method, ctx, {"w": torch.tensor([3.0])}, {"w": torch.tensor([2.0])})
    assert average(method, ctx)["w"].item() == expected


@pytest.mark.parametrize(("variant", "expected"), [("released", [0.830380, 0.769620]), ("paper", [3.975443, 3.684557])])
def test_t3_the_variants_differ(variant: str, expected: list[float]) -> None:
    assert second_step(CiaConfig(variant=variant), *T3) == pytest.approx(expected, abs=1e-5)


def test_three_steps_and_their_report() -> None:
    """One weight goes 0, 8, 10 with the gradients 1, 3, 4. Step 1 has no gradient before it: half of the way from 0 to
    0. Step 2 takes (3 + 1) / (8 * 2) = 1/4 of the way from 0 to 8, step 3 (4 + 1) / (8 * 1) = 5/8 of that from 2 to
    10. So the average ends at 7, seven tenths of the way of the weights."""
    method = Cia(CiaConfig(scale=1.0, beta_fallback=0.5))
    ctx = begun(method, Weights(torch.zeros(1)))
    for gradient, weight, kept, beta, fallback in ((1, 0, 0, 0.5, 1), (3, 8, 2, 0.75, 0), (4, 10, 7, 0.375, 0)):
        step(method, ctx, {"w": torch.tensor([float(gradient)])}, {"w": torch.tensor([float(weight)])})
        assert average(method, ctx)["w"].item() == kept
        assert ctx.logged == {"cia_beta": beta, "cia_fallback": fallback}
    meta = method.end_task(ctx).meta
    assert meta["mean_beta"] == pytest.approx((0.5 + 0.75 + 0.375) / 3)
    assert meta["fallback_share"] == pytest.approx(1 / 3)
    assert meta["ratio"] == pytest.approx(0.7)


def test_t4_fixed_starts_from_the_weights_before_the_first_step() -> None:
    method = Cia(CiaConfig(variant="fixed"))
    ctx = begun(method, Weights(torch.zeros(1)))
    for _ in range(3):
        step(method, ctx, {"w": torch.zeros(1)}, {"w": torch.ones(1)})
    # Started from the weights after step 1 it would be 1.
    assert average(method, ctx)["w"].item() == pytest.approx(0.029701, abs=1e-6)


def test_t4_fixed_takes_its_constant() -> None:
    method = Cia(CiaConfig(variant="fixed", beta_fallback=0.5))
    ctx = begun(method, Weights(torch.zeros(1)))
    step(method, ctx, {"w": torch.zeros(1)}, {"w": torch.ones(1)})
    assert average(method, ctx)["w"].item() == 0.5
    assert ctx.logged == {"cia_beta": 0.5}  # all of its steps fall back, which says nothing


class Unasked(FakeGradients):
    """Gathering all gradients costs time and memory."""

    def flat(self) -> Tensor:
        raise AssertionError("gathered for nothing")


def test_gradients_are_gathered_only_where_a_formula_needs_them() -> None:
    gradients = Unasked({"w": torch.ones(1)})
    fixed = Cia(CiaConfig(variant="fixed"))
    fixed.gradients(begun(fixed, Weights(torch.zeros(1))), gradients)
    first, ctx = Cia(CiaConfig()), FakeContext(Weights(torch.zeros(1)))
    first.train_begin(ctx)
    first.gradients(ctx, gradients)


def trained(
    method: Cia, ctx: FakeContext, steps: range, resumed_at: int | None = None, folder: Path | None = None
) -> tuple[Cia, FakeContext]:
    """Drive through fixed random steps; at `resumed_at`, store, and go on with a new method and model."""
    for number in steps:
        if number == resumed_at:
            assert folder is not None
            state = method.checkpoint_state(ctx)
            assert state is not None
            save_method_state(folder, "cia", state)
            live = {name: p.detach().clone() for name, p in ctx.parameters.items()}
            method = Cia(method.config)
            ctx = begun(method, Weights(torch.ones(3, 4), torch.ones(5)))  # nothing may be left of this beginning
            with torch.no_grad():
                for name, value in live.items():
                    ctx.parameters[name].copy_(value)
            method.restore_checkpoint(ctx, load_method_state(folder, "cia"))
        random = torch.Generator().manual_seed(number)
        gradients = {name: torch.randn(p.shape, generator=random) for name, p in ctx.parameters.items()}
        moved = {name: p.detach() - 0.3 * gradients[name] for name, p in ctx.parameters.items()}
        step(method, ctx, gradients, moved)
    return method, ctx


def model_of_two() -> Weights:
    return Weights(torch.linspace(-3, 3, 12).view(3, 4), torch.linspace(0, 9, 5))


@pytest.mark.parametrize("variant", ["released", "paper", "fixed"])
@pytest.mark.parametrize("resumed_at", [0, 1, 4])
def test_t5_resumed_equals_uninterrupted(variant: str, resumed_at: int, tmp_path: Path) -> None:
    config = CiaConfig(variant=variant, scale=0.02) if variant == "released" else CiaConfig(variant=variant)
    one, two = Cia(config), Cia(config)
    one, ctx_one = trained(one, begun(one, model_of_two()), range(8))
    two, ctx_two = trained(two, begun(two, model_of_two()), range(8), resumed_at, tmp_path)
    kept, again, live = average(one, ctx_one), average(two, ctx_two), ctx_one.weights()
    for name in ("w", "v"):
        assert torch.equal(kept[name], again[name])
        assert not torch.equal(kept[name], live[name])
        assert kept[name].dtype == torch.float32
    assert one.end_task(ctx_one).meta == two.end_task(ctx_two).meta


def test_one_beta_a_tensor() -> None:
    method = Cia(CiaConfig(variant="paper"))
    ctx = begun(method, Weights(torch.zeros(2), torch.zeros(1)))
    first = {"w": torch.tensor([4.0, 4.0]), "v": torch.tensor([1.0])}
    step(method, ctx, {"w": torch.tensor([-1.0, 1.0]), "v": torch.tensor([1.0])}, first)
    second = {"w": torch.tensor([4.1, 3.8]), "v": torch.tensor([1.1])}
    step(method, ctx, {"w": torch.tensor([2.0, -1.0]), "v": torch.tensor([1.0])}, second)
    # w: 4 * 0.3 / (7.82 * 5); v: the gradient did not change, so the denominator is zero and beta is 0.99.
    beta = 4 * 0.3 / (7.82 * 5)
    found = average(method, ctx)
    expected = [beta * 0.04 + (1 - beta) * 4.1, beta * 0.04 + (1 - beta) * 3.8]
    assert found["w"].tolist() == pytest.approx(expected, abs=1e-5)
    assert found["v"].item() == pytest.approx(0.99 * 0.01 + 0.01 * 1.1, abs=1e-6)
    assert ctx.logged["cia_fallback"] == 0.5
    assert ctx.logged["cia_beta"] == pytest.approx((beta + 0.99) / 2, abs=1e-5)


def test_t6_two_ranks_with_different_data_keep_the_same_average() -> None:
    """What the ranks see is the reduced gradient; the average depends on it and on the weights alone."""
    methods = [Cia(CiaConfig(scale=0.02)) for _ in range(2)]
    contexts = [begun(method, model_of_two(), rank) for rank, method in enumerate(methods)]
    for number in range(6):
        random = torch.Generator().manual_seed(number)
        local = [
            {name: torch.randn(p.shape, generator=random) for name, p in contexts[0].parameters.items()}
            for _ in range(2)
        ]
        reduced = {name: (local[0][name] + local[1][name]) / 2 for name in local[0]}
        moved = {name: p.detach() - 0.3 * reduced[name] for name, p in contexts[0].parameters.items()}
        for method, ctx in zip(methods, contexts, strict=True):
            inputs = {"labels": torch.full((1, 3), method is methods[0])}
            assert method.loss(ctx, ctx.model, inputs, torch.tensor(1.0), None) is None
            step(method, ctx, reduced, moved)
    first, second = (average(method, ctx) for method, ctx in zip(methods, contexts, strict=True))
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == torch.float32 for name in first)


def test_the_gradient_is_copied() -> None:
    """Clipping scales the engine's buffer after the hook; the formula must see what the hook saw."""
    method = Cia(CiaConfig(variant="paper"))
    start = (torch.tensor([0.0, 0.2], dtype=torch.float64) - 0.01) / 0.99
    ctx = begun(method, Weights(start.float()))
    for g, th in (((0.1, 0.15), (1.0, 1.0)), ((0.5, -0.25), (1.1, 0.8))):
        buffer = torch.tensor(g)

        class Buffer(FakeGradients):
            def flat(self) -> Tensor:
                return buffer  # noqa: B023

        method.gradients(ctx, Buffer({"w": buffer}))
        buffer.mul_(0.1)
        with torch.no_grad():
            ctx.parameters["w"].copy_(torch.tensor(th))
        method.after_step(ctx)
    assert average(method, ctx)["w"].tolist() == pytest.approx([0.675368, 0.568382], abs=1e-5)


def test_a_skipped_step_leaves_no_trace() -> None:
    """The loss scaler skips a step: `gradients` ran, `after_step` did not."""
    config = CiaConfig(variant="paper")
    results = []
    for skipped in (False, True):
        method = Cia(config)
        ctx = begun(method, model_of_two())
        method, ctx = trained(method, ctx, range(3))
        if skipped:
            method.gradients(ctx, FakeGradients({"w": torch.full((3, 4), math.inf), "v": torch.zeros(5)}))
        method, ctx = trained(method, ctx, range(3, 6))
        results.append(average(method, ctx))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_live_weights_are_never_touched() -> None:
    method = Cia(CiaConfig(variant="fixed"))
    ctx = begun(method, Weights(torch.zeros(2)))
    step(method, ctx, {"w": torch.ones(2)}, {"w": torch.tensor([1.0, 2.0])})
    method.end_task(ctx)
    average(method, ctx)["w"].fill_(7.0)
    assert ctx.parameters["w"].tolist() == [1.0, 2.0]


def test_what_has_no_average_is_kept_as_it_is() -> None:
    method = Cia(CiaConfig(variant="fixed", beta_fallback=0.5))
    ctx = begun(method, Weights(torch.zeros(1)))
    step(method, ctx, {"w": torch.ones(1)}, {"w": torch.ones(1)})
    kept = method.export(ctx, {**ctx.weights(), "frozen": torch.full((1,), 3.0)})
    assert {name: tensor.item() for name, tensor in kept.items()} == {"w": 0.5, "frozen": 3.0}


def test_first_task_is_plain() -> None:
    method = Cia(CiaConfig())
    ctx = FakeContext(Weights(torch.zeros(2)))
    method.train_begin(ctx)
    step(method, ctx, {"w": torch.ones(2)}, {"w": torch.ones(2)})
    assert method.checkpoint_state(ctx) is None
    tensors = ctx.weights()
    assert method.export(ctx, tensors) is tensors
    assert method.end_task(ctx).meta == {
        "parameters": {"w": [2]},
        "variant": "released",
        "mean_beta": None,
        "fallback_share": None,
        "ratio": None,
    }
    assert not ctx.logged


def test_end_reports_how_far_the_average_went() -> None:
    method = Cia(CiaConfig(variant="fixed", beta_fallback=0.75))
    ctx = begun(method, Weights(torch.zeros(2)))
    step(method, ctx, {"w": torch.ones(2)}, {"w": torch.tensor([3.0, 4.0])})
    meta = method.end_task(ctx).meta
    assert (meta["mean_beta"], meta["ratio"], meta["fallback_share"]) == (0.75, 0.25, None)
    assert not ctx.notices

    method = Cia(CiaConfig(variant="fixed", beta_fallback=0.01))
    ctx = begun(method, Weights(torch.zeros(2)))
    step(method, ctx, {"w": torch.ones(2)}, {"w": torch.tensor([3.0, 4.0])})
    assert method.end_task(ctx).meta["ratio"] == pytest.approx(0.99)
    assert len(ctx.notices) == 1
    assert "0.990 of the way" in ctx.notices[0]


def test_nothing_is_divided_by_zero_without_a_step_or_a_movement() -> None:
    method = Cia(CiaConfig(variant="fixed"))
    ctx = begun(method, Weights(torch.ones(2)))
    assert {method.end_task(ctx).meta[name] for name in ("mean_beta", "fallback_share", "ratio")} == {None}
    step(method, ctx, {"w": torch.zeros(2)}, {"w": torch.ones(2)})
    meta = method.end_task(ctx).meta
    assert (meta["mean_beta"], meta["ratio"]) == (pytest.approx(0.99), None)


def test_another_shape_or_variant_is_refused() -> None:
    before = Cia(CiaConfig()).end_task(FakeContext(Weights(torch.zeros(2))))
    with pytest.raises(UserError, match=r"1 differ: w: \[2\] in the state, \[3\] now"):
        Cia(CiaConfig()).train_begin(FakeContext(Weights(torch.zeros(3)), earlier=["t0"], state=before))
    method = Cia(CiaConfig())
    state = method.checkpoint_state(begun(method, Weights(torch.zeros(2))))
    assert isinstance(state, MethodState)
    other = Cia(CiaConfig(variant="fixed"))
    with pytest.raises(UserError, match="--cia_variant is 'fixed', but the checkpoint was trained with 'released'"):
        other.restore_checkpoint(begun(other, Weights(torch.zeros(2))), state)
    wider = Cia(CiaConfig())
    with pytest.raises(UserError, match=r"1 differ: w: \[2\] in the state, \[3\] now"):
        wider.restore_checkpoint(begun(wider, Weights(torch.zeros(3))), state)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"beta_fallback": 1.0}, r"--cia_beta_fallback is 1.0, allowed: a number in \(0, 1\)"),
        ({"beta_fallback": math.nan}, "--cia_beta_fallback is nan"),
        ({"scale": 0.0}, "--cia_scale is 0.0, allowed: a number > 0"),
        ({"scale": 1.0, "variant": "paper"}, "--cia_scale is 1.0, allowed: only with --cia_variant released"),
    ],
)
def test_values_out_of_range(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CiaConfig(**flags).validate()
    CiaConfig().validate()
