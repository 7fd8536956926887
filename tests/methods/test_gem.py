"""gem and agem against numbers worked out by hand, on the linear model of `tests.support.linear_memory`."""

import numpy as np
import pytest
import torch
from torch import nn

from swift_cl.errors import UserError
from swift_cl.io import load_method_state, save_method_state
from swift_cl.methods._projection import LARGEST_WEIGHT, gem_weights, gram
from swift_cl.methods.gem import Gem, GemConfig
from tests.support.linear_memory import Linear, VectorContext, begun, gradients
from tests.support.ranks import on_ranks


def step_of(g, *memories, **settings):
    """The change of theta in one step of SGD with lr 1 from theta = 0; it is -z, so its negative is returned."""
    tasks = {f"t{k}": [vector] for k, vector in enumerate(memories)}
    method, ctx = begun(tasks, len(g), **settings)
    grads = gradients(g)
    method.gradients(ctx, grads)
    optimizer = torch.optim.SGD(ctx.model.parameters(), lr=1.0)
    for name, parameter in ctx.model.named_parameters():
        parameter.grad = grads[name].clone()
    optimizer.step()
    return (-ctx.model.theta.detach()).tolist()


def close(a, b, tolerance=1e-5):
    return a == pytest.approx(b, abs=tolerance)


def test_projection_of_one_violated_constraint():
    """T1."""
    g, g1 = (1.0, 0.0), (-0.5, 1.0)
    pure = step_of(g, g1, margin=0.0)
    assert close(pure, [0.8, 0.4])
    assert abs(np.dot(pure, g1)) < 1e-5
    with_margin = step_of(g, g1, margin=0.5)
    assert close(with_margin, [0.75, 0.5])
    assert np.dot(with_margin, g1) == pytest.approx(0.125, abs=1e-5)
    assert not close(pure, [1.8, 0.4], 0.1)  # a second backward by the trainer would add g again
    assert close(step_of(g, g1), with_margin)  # 0.5 is the default


def test_opposite_gradients_cancel():
    """T2."""
    z = step_of((1.0, 0.0), (-1.0, 0.0), margin=0.0)
    assert close(z, [0, 0])
    assert not close(z, [0.5, 0], 0.1)  # the penalty form with its cap of .5


def test_products_count_every_number_of_a_long_vector() -> None:
    """More than a part of 2^20 numbers: 2^20 + 3 ones, and as many twos."""
    count = (1 << 20) + 3
    found = gram([torch.ones(count), torch.full((count,), 2.0)])
    assert found.tolist() == [[count, 2 * count], [2 * count, 4 * count]]


def test_two_constraints_are_met_together():
    """T3."""
    g, g1, g2 = (1.0, 0.5, 1.0), (-1.0, 0.0, 0.0), (0.6, -1.0, 0.0)
    z = step_of(g, g1, g2, margin=0.0)
    assert close(z, [0, 0, 1])
    assert not close(z, [0.2206, 0.1324, 1], 0.05)  # one at a time: violates g1
    vectors = [torch.tensor(v, dtype=torch.float64) for v in (g1, g2, g)]
    products = gram(vectors).numpy()
    assert gem_weights(products[:2, :2], products[:2, 2], 0.0, 1e-9).weights.tolist() == pytest.approx([1.3, 0.5])
    # v is what has to be added to g: the reconstruction from it is z.
    assert close(np.array(g) + 1.3 * np.array(g1) + 0.5 * np.array(g2), [0, 0, 1])


def test_agem_has_one_constraint_on_all_memories():
    """T3, agem: the pooled memory's gradient is the mean of g1 and g2."""
    g, g1, g2 = (1.0, 0.5, 1.0), (-1.0, 0.0, 0.0), (0.6, -1.0, 0.0)
    z = step_of(g, g1, g2, mode="agem")
    assert close(z, [0.689655, -0.275862, 1.0])
    assert abs(np.dot(z, [-0.2, -0.5, 0.0])) < 1e-6


def test_the_margin_also_adds_tasks_that_are_not_violated():
    """T4."""
    g, g1, g2 = (1.0, 0.5, 1.0), (-1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    assert close(step_of(g, g1, g2, margin=0.0), [0, 0.5, 1])
    assert close(step_of(g, g1, g2, margin=0.5), [0, 1, 1])


def test_equal_memory_gradients_are_no_problem():
    """T5: P is singular."""
    assert close(step_of((1.0, 0.0), (-0.5, 1.0), (-0.5, 1.0), margin=0.0), [0.8, 0.4])


def test_the_ridge_is_relative():
    """T6: everything times 1e-3."""
    z = [x / 1e-3 for x in step_of((1e-3, 0.0), (-0.5e-3, 1e-3), margin=0.0)]
    assert close(z, [0.8, 0.4])
    assert not close(z, [0.99975, 0.0005], 0.01)  # an absolute ridge of 1e-3


def test_the_ridge_is_relative_to_the_mean_square_of_the_memory_gradients():
    """eps 1 doubles P where there is one memory: v = .5 / (2 x 1.25) = .2, so z = (1, 0) + .2 (-.5, 1).

    With two of length 1 the mean is 1, so v_k = 1 / (1 + 1); their sum, 2, or a ridge between the two would give 1 / 3.
    """
    assert close(step_of((1.0, 0.0), (-0.5, 1.0), margin=0.0, eps=1.0), [0.9, 0.2])
    assert gem_weights(np.eye(2), np.array([-1.0, -1.0]), 0.0, 1.0).weights.tolist() == pytest.approx([0.5, 0.5])


def test_agem_has_no_margin():
    """The numbers of T1: the weight .4 lies below the margin, which is .5."""
    assert close(step_of((1.0, 0.0), (-0.5, 1.0), mode="agem"), [0.8, 0.4])


def test_products_are_in_fp64():
    """(10^4, 1) . (10^4, -1) = 10^8 - 1, for which fp32 has no number."""
    assert gram([torch.tensor([1e4, 1.0]), torch.tensor([1e4, -1.0])])[0, 1].item() == 99_999_999


@pytest.mark.parametrize("mode", ["gem", "agem"])
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_without_a_violation_the_gradient_stays_bit_identical(mode, margin):
    """T7; the product may also be exactly zero."""
    for g1 in ((0.5, 1.0), (0.0, 1.0), (0.0, 0.0)):
        method, ctx = begun({"old": [g1]}, mode=mode, margin=margin)
        grads = gradients((1.0, 0.0))
        before = {name: grads[name].clone() for name in grads.names}
        method.gradients(ctx, grads)
        assert grads.written == set()
        assert all(torch.equal(grads[name], before[name]) for name in grads.names)
        assert ctx.logged["gem_min_cos"] >= 0.0  # also with a memory gradient of zero


@pytest.mark.parametrize("mode", ["gem", "agem"])
def test_the_first_task_is_untouched(mode):
    method, ctx = begun({}, mode=mode, refresh_steps=3)
    grads = gradients((1.0, 0.0))
    method.gradients(ctx, grads)
    assert grads.written == set()
    assert ctx.forwards == 0
    assert ctx.logged == {}
    assert method.checkpoint_state(ctx) is None


MANY = {
    "a": [(np.sin(i + 1), np.cos(3 * i), -0.3 * i, 0.7) for i in range(11)],
    "b": [(-1.0, np.sin(i), 0.2, np.cos(i)) for i in range(3)],
}
CURRENT = torch.tensor([[1.0, -0.4, 0.6, -1.1], [0.2, -0.7, 1.3, -0.2], [1.1, 0.1, 0.4, -0.3]])


def z_of(world_size, g, steps=(5,), micro_batch=2, forwards=None, **settings):
    def work(ctx_of_rank):
        method, ctx = begun(MANY, 4, ctx_of_rank.rank, world_size, **settings)
        ctx.all_reduce_sum, ctx.micro_batch = ctx_of_rank.all_reduce_sum, micro_batch
        found = []
        for ctx.step in steps:
            grads = gradients(g.tolist())
            method.gradients(ctx, grads)
            found.append(grads["theta"])
        if forwards is not None:
            forwards.append(ctx.forwards)
        return torch.stack(found)

    return on_ranks(world_size, lambda rank, size: VectorContext(rank=rank, world_size=size), work)


@pytest.mark.parametrize("mode", ["gem", "agem"])
@pytest.mark.parametrize("mem_batch", [0, 3, 7])
def test_ranks_share_the_work_and_agree(mode, mem_batch):
    """T8, ranks: 1, 2 and 3 give the same z, also where the rows do not divide evenly or a rank has none."""
    g = CURRENT.mean(0)
    settings = {"mode": mode, "mem_batch": mem_batch, "margin": 0.0}
    (alone,) = z_of(1, g, **settings)
    assert not torch.allclose(alone[0], g)
    for world_size in (2, 3):
        for z in z_of(world_size, g, micro_batch=1, **settings):
            torch.testing.assert_close(z, alone, rtol=1e-5, atol=1e-6)


def test_accumulation_gives_the_same_step():
    """T8, accumulation: the hook sees one accumulated gradient; the model's own is the same either way."""

    def accumulated(splits):
        model = Linear(4)
        for part in CURRENT.repeat(8, 1)[:8].chunk(splits):
            logits = model(part).logits[:, :1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, torch.zeros(len(part), dtype=torch.long), reduction="sum") / 8
            loss.backward()
        return model.theta.grad

    zs = [z_of(1, accumulated(splits), margin=0.0)[0] for splits in (1, 8)]
    torch.testing.assert_close(*zs, rtol=1e-5, atol=1e-6)


def test_a_rank_without_rows_runs_as_many_forwards_as_the_others():
    """Task b has 3 rows: of 4 ranks one has none, but under ZeRO-3 a forward needs them all."""
    forwards = []
    (alone,) = z_of(1, CURRENT.mean(0), mem_batch=0, margin=0.0)
    for z in z_of(4, CURRENT.mean(0), mem_batch=0, margin=0.0, micro_batch=1, forwards=forwards):
        torch.testing.assert_close(z, alone, rtol=1e-5, atol=1e-6)
    assert forwards == [3 + 1] * 4


def test_refreshed_gradients_are_kept_between_and_survive_a_checkpoint(tmp_path):
    """Stopped after step 4 and resumed equals uninterrupted, bit for bit; between refreshes nothing is recomputed."""
    settings = {"refresh_steps": 3, "mem_batch": 2, "margin": 0.0}

    def drift(ctx, step):  # stands for the optimizer: g_k depends on the weights at the refresh
        ctx.model.theta.data.fill_(0.1 * step)

    def run(method, ctx, steps):
        found = []
        for step in steps:
            ctx.step = step
            drift(ctx, step)
            grads = gradients(CURRENT[step % 3].tolist())
            method.gradients(ctx, grads)
            found.append(grads["theta"])
        return found

    method, ctx = begun(MANY, 4, **settings)
    whole = run(method, ctx, range(8))
    assert ctx.forwards == 3 * 2  # steps 0, 3, 6; two tasks

    method, ctx = begun(MANY, 4, **settings)
    run(method, ctx, range(5))
    save_method_state(tmp_path, "gem", method.checkpoint_state(ctx))
    method, ctx = begun(MANY, 4, step=5, **settings)
    assert method.checkpoint_state(ctx) is not None  # so that a resumed run demands the file
    method.restore_checkpoint(ctx, load_method_state(tmp_path, "gem"))
    resumed = run(method, ctx, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole[5:], strict=True))
    assert ctx.forwards == 2

    method, ctx = begun(MANY, 4, step=5, mode="agem", **settings)
    with pytest.raises(UserError, match="was --gem_mode changed"):
        method.restore_checkpoint(ctx, load_method_state(tmp_path, "gem"))


def test_stored_gradients_are_found_by_their_names():
    """A file has the tensors in an order of its own; the numbers are those of T1."""
    method, ctx = begun({"old": [(-0.5, 1.0)]}, refresh_steps=3, margin=0.0)
    method.gradients(ctx, gradients((1.0, 0.0)))
    state = method.checkpoint_state(ctx)
    state.tensors = dict(reversed(state.tensors.items()))
    resumed, ctx = begun({"old": [(-0.5, 1.0)]}, step=1, refresh_steps=3, margin=0.0)
    resumed.restore_checkpoint(ctx, state)
    grads = gradients((1.0, 0.0))
    resumed.gradients(ctx, grads)
    assert ctx.forwards == 0
    assert close(grads["theta"].tolist(), [0.8, 0.4])


def test_without_refresh_steps_nothing_is_checkpointed():
    method, ctx = begun({"old": [(1.0, 0.0)]})
    method.gradients(ctx, gradients((1.0, 0.0)))
    assert method.checkpoint_state(ctx) is None


def test_what_is_logged():
    method, ctx = begun({"a": [(-0.5, 1.0)], "b": [(1.0, 0.0)], "c": [(1.0, 1.0)]}, margin=0.0)
    ctx.model.theta.data += torch.tensor([0.3, -0.2])  # changes the length of a one-row memory's gradient only
    method.gradients(ctx, gradients((2.0, 0.0)))
    assert ctx.logged["gem_violated"] == 1
    assert ctx.logged["gem_min_cos"] == pytest.approx(-0.5 / 1.25**0.5)  # (-.5, 1) and the direction (1, 0)
    ctx.model.theta.data -= torch.tensor([-3.0, 4.0])  # the update that the optimizer really made
    method.after_step(ctx)
    assert ctx.logged["gem_update_min_cos"] == pytest.approx(-0.6)  # with b; with a and c it is positive
    ctx.logged.clear()
    ctx.is_logging_step = False
    method.gradients(ctx, gradients((1.0, 0.0)))
    method.after_step(ctx)
    assert "gem_update_min_cos" not in ctx.logged


def test_how_many_memories_are_violated_is_logged():
    """Of (-1, 0), (-1, 1) and (1, 0) two."""
    method, ctx = begun({"a": [(-1.0, 0.0)], "b": [(-1.0, 1.0)], "c": [(1.0, 0.0)]})
    method.gradients(ctx, gradients((1.0, 0.0)))
    assert ctx.logged["gem_violated"] == 2


def test_an_update_of_zero_has_the_cosine_zero():
    """A learning rate of 0, as at the first step of a warm-up."""
    method, ctx = begun({"old": [(-0.5, 1.0)]})
    method.gradients(ctx, gradients((1.0, 0.0)))
    method.after_step(ctx)
    assert ctx.logged["gem_update_min_cos"] == 0.0


def test_weights_before_a_step_that_was_skipped_are_forgotten():
    """The loss scaler leaves a logging step out; the update of the next one is not that of both."""
    method, ctx = begun({"old": [(-0.5, 1.0)]})
    method.gradients(ctx, gradients((1.0, 0.0)))
    ctx.is_logging_step = False
    method.gradients(ctx, gradients((1.0, 0.0)))
    method.after_step(ctx)
    assert "gem_update_min_cos" not in ctx.logged


def test_gradients_that_are_not_finite_are_left_alone():
    method, ctx = begun({"old": [(-1.0, 0.0)]})
    grads = gradients((float("inf"), 0.0))
    method.gradients(ctx, grads)
    assert grads.written == set()
    assert "not finite" in ctx.notices[-1]


def test_huge_weights_fall_back_to_a_larger_ridge():
    products, against = np.array([[1.0, 1 - 1e-13], [1 - 1e-13, 1.0]]), np.array([-1e7, 1e7])
    assert gem_weights(np.eye(2), np.array([-1.0, 1.0]), 0.0, 1e-6).fell_back is False
    solution = gem_weights(products, against, 0.0, 1e-12)
    assert solution.fell_back
    expected = gem_weights(products, against, 0.0, 1e-3)
    assert solution.weights.tolist() == expected.weights.tolist()
    # The margin holds for the second solution too: of v_1 = 10^7 / 1.001 and v_2 = 0 without it.
    with_margin = gem_weights(np.eye(2), np.array([-1e7, 1.0]), 0.5, 1e-6)
    assert with_margin.weights.tolist() == pytest.approx([1e7 / 1.001, 0.5])
    assert LARGEST_WEIGHT == 1e6


def test_a_fallback_is_told():
    """v = 10^7 for g = (10^7, 0) and g_1 = (-1, 0)."""
    method, ctx = begun({"old": [(-1.0, 0.0)]}, step=4)
    method.gradients(ctx, gradients((1e7, 0.0)))
    assert ctx.notices == ["step 4: weights above 1e+06, so the ridge 0.001 was used"]


def test_gem_uses_all_its_settings():
    _, ctx = begun({"old": [(1.0, 0.0)]}, margin=0.25, eps=1e-3)
    assert ctx.notices == []


def test_agem_says_which_settings_it_does_not_use():
    _, ctx = begun({"old": [(1.0, 0.0)]}, mode="agem", margin=0.25, eps=1e-3)
    assert len(ctx.notices) == 2
    assert "--gem_margin 0.25 has no effect" in ctx.notices[0]
    assert "--gem_eps 0.001 has no effect" in ctx.notices[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_size": 0}, "--gem_memory_size is 0, allowed: 1 or more"),
        ({"mem_batch": -1}, "--gem_mem_batch is -1, allowed: 0 or more"),
        ({"margin": -0.1}, "--gem_margin is -0.1, allowed: 0 or more"),
        ({"margin": float("nan")}, "--gem_margin is nan"),
        ({"eps": 0.0}, "--gem_eps is 0.0, allowed: more than 0"),
        ({"refresh_steps": 0}, "--gem_refresh_steps is 0, allowed: 1 or more"),
        ({"seed": -1}, "--gem_seed is -1, allowed: 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        GemConfig(**settings).validate()


def test_support():
    support = Gem(GemConfig()).supports()
    assert support.full_deepspeed == (0, 1, 2, 3)
    assert support.deepspeed == (0, 1, 2, 3)
    assert not support.sequence_parallel
    assert not support.liger
    assert Gem.needs_rows
