"""Token means of several groups over a whole optimizer step (O3 and O4 of the specification)."""

import math
from types import SimpleNamespace

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.methods._grouped_loss import Groups, answer_logits, token_losses, token_rows
from swift_cl.methods.lamol import CHANNELS
from tests.support.fake_context import FakeContext
from tests.support.ranks import on_ranks

WEIGHTS = {"qa": 1.0, "lm": 0.25}


def batch(**rows):
    """A micro-batch with one row a channel (`_` stands for `/`) and as many labels as that row has token losses."""
    width = 1 + max(map(len, rows.values()))
    labels = torch.full((len(rows), width), -100)
    for i, losses in enumerate(rows.values()):
        labels[i, 1 : 1 + len(losses)] = 7
    return {"labels": labels, "channel": [name.replace("_", "/") for name in rows]}


def loss_of(ctx, groups, rows):
    inputs = batch(**rows)
    mask, index = groups.index(inputs, inputs["channel"])
    losses = torch.tensor([loss for own in rows.values() for loss in own])
    assert int(mask.sum()) == len(losses)
    return groups.total(ctx, groups.sums(losses, index), "lamol")


def test_o3_accumulation():
    one = {"new_qa": [1.0, 2.0], "new_lm": [3.0]}
    two = {"new_qa": [], "pseudo_lm": [5.0, 5.0, 8.0]}
    ctx, groups = FakeContext(), Groups(CHANNELS, WEIGHTS)
    groups.window(ctx, [batch(**one), batch(**two)])
    losses = [loss_of(ctx, groups, rows) for rows in (one, two)]
    assert float(sum(losses)) == pytest.approx(2.8125)  # 3/2 + 0.25 x 21/4; by micro-batch means 1.875, jointly 1.375
    assert ctx.logged["lamol_qa"] == 0.0  # of the second micro-batch, times their number
    assert ctx.logged["lamol_lm"] == pytest.approx(18 / 4 * 2)


def test_o4_ranks():
    rows = [{"new_qa": [1.0, 3.0], "new_lm": [2.0]}, {"new_qa": [], "new_lm": [4.0, 6.0]}]

    def work(ctx):
        groups = Groups(CHANNELS, WEIGHTS)
        groups.window(ctx, [batch(**rows[ctx.rank])])
        loss = float(loss_of(ctx, groups, rows[ctx.rank])) * ctx.world_size  # the fake window_mean has no factor W
        return loss, ctx.logged["lamol_lm"]

    found = on_ranks(2, lambda rank, size: FakeContext(rank=rank, world_size=size), work)
    assert sum(loss for loss, _ in found) / 2 == pytest.approx(3.0)  # by local means 1.875
    assert sum(logged for _, logged in found) / 2 == pytest.approx((2.0 + 4.0 + 6.0) / 3)


def test_a_group_without_tokens_adds_nothing():
    ctx, groups = FakeContext(), Groups(CHANNELS, WEIGHTS)
    rows = {"new_qa": [1.0, 2.0]}
    groups.window(ctx, [batch(**rows)])
    assert float(loss_of(ctx, groups, rows)) == 1.5
    assert ctx.logged["lamol_lm"] == 0.0


def test_weighted_tokens():
    """(d): losses 1, 4, 1 with a separator that weighs 5 have the mean 22/7, and without weights 2."""
    rows = {"new_qa": [2.0], "new_lm": [1.0, 4.0, 1.0]}
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 5.0, 1.0]])
    found = {}
    for weighted in (True, False):
        ctx, groups = FakeContext(), Groups(CHANNELS, WEIGHTS, weighted)
        inputs = {**batch(**rows), "loss_scale": weights}
        groups.window(ctx, [inputs, inputs])
        mask, index = groups.index(inputs, inputs["channel"])
        losses = torch.tensor([loss for own in rows.values() for loss in own])
        sums = groups.sums(losses * weights[:, 1:][mask] if weighted else losses, index)
        found[weighted] = float(groups.total(ctx, sums, "lamol")) * 2  # two equal micro-batches
    assert found[True] == pytest.approx(2.0 + 0.25 * 22 / 7)
    assert found[False] == pytest.approx(2.0 + 0.25 * 2.0)


def test_rows_without_channel_are_new_questions():
    groups = Groups(CHANNELS, WEIGHTS)
    _, index = groups.index({"labels": torch.tensor([[-100, 1], [-100, 2]])}, None)
    assert index.tolist() == [0, 0]


def packed(**extra):
    """Three rows of 3, 2 and 4 tokens in one line, their last 2, 1 and 2 tokens supervised."""
    labels = torch.tensor([[-100, 1, 2, -100, 3, -100, -100, 4, 5]])
    return {"labels": labels, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]]), **extra}


def test_rows_of_packed_labels():
    whole = packed()
    mask = whole["labels"][:, 1:] != -100
    assert token_rows(whole, 3)[mask].tolist() == [0, 0, 1, 2, 2]
    # As ms-swift cuts the labels where only some logits are computed (`prepare_logits_to_keep`).
    supervised = (whole["labels"] != -100)[0]
    cut = torch.nn.functional.pad(whole["labels"][:, supervised], (1, 0), value=-100)
    kept = torch.nn.functional.pad(supervised[1:], (0, 1), value=True)
    assert token_rows(packed(labels=cut, logits_to_keep=kept), 3).tolist() == [[0, 0, 1, 2, 2]]
    tail = packed(labels=whole["labels"][:, -5:], logits_to_keep=5)
    assert token_rows(tail, 3)[tail["labels"][:, 1:] != -100].tolist() == [2, 2]
    padded = packed(position_ids=torch.tensor([[0, 1, 2, 0, 1, 0, 1, 0, 0]]))
    assert token_rows(padded, 3).max() == 2
    with pytest.raises(UserError, match="begin 3 times"):
        token_rows(whole, 4)
    with pytest.raises(UserError, match="without position ids"):
        token_rows({"labels": whole["labels"]}, 3)


def test_token_losses_are_shifted_and_in_fp32():
    logits = torch.zeros(1, 3, 4, dtype=torch.bfloat16)
    logits[0, 1, 2] = math.log(5)
    labels = torch.tensor([[-100, -100, 2]])
    losses = token_losses(logits, labels, labels[:, 1:] != -100)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([math.log(8 / 5)], rel=1e-2)
    wrong = SimpleNamespace(logits=logits[:, :2])
    with pytest.raises(UserError, match=r"method 'm' needs the model's logits at every label, found \(1, 2\)"):
        answer_logits("m", {"labels": labels}, wrong)
    with pytest.raises(UserError, match="found none"):
        answer_logits("m", {"labels": labels}, SimpleNamespace())
