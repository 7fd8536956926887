"""migu against hand-computed numbers: magnitudes, masks, and what a step then moves."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift_cl.errors import UserError
from swift_cl.methods.migu import Migu, MiguConfig, unit_mask
from swift_cl.training.before import parameter_name
from tests.support.fake_context import FakeContext, FakeGradients
from tests.support.ranks import on_ranks
from tests.support.tiny_lora import continued, language_model, stage_adapter
from tests.support.train import train_stage


def test_the_top_half_of_the_outputs() -> None:
    found = Migu(MiguConfig(statistic="sum")).magnitudes(torch.tensor([[[0.1, -3.0, 2.0, 0.5]]]), None)
    assert unit_mask(found, 0.5).tolist() == [False, True, True, False]  # signed, -3 would be the smallest


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 8), (0.5, 4), (0.7, 3), (0.99, 1)])
def test_how_many_of_eight_units_are_kept(ratio: float, kept: int) -> None:
    assert int(unit_mask(torch.arange(8.0), ratio).sum()) == kept


def test_a_layer_that_puts_out_nothing_yet_is_trained_whole() -> None:
    method = Migu(MiguConfig())
    assert unit_mask(method.magnitudes(torch.zeros(1, 3, 4), None), 0.7).all()


def test_every_token_has_one_vote_when_normalized() -> None:
    """Two tokens: (1, 3) and (100, 20). Shares (.25, .75) and (.8333, .1667); sums (101, 23)."""
    output = torch.tensor([[[1.0, 3.0], [100.0, 20.0]]])
    assert Migu(MiguConfig()).magnitudes(output, None).tolist() == pytest.approx([0.25 + 5 / 6, 0.75 + 1 / 6])
    assert Migu(MiguConfig(statistic="sum")).magnitudes(output, None).tolist() == [101.0, 23.0]


def test_padding_has_none() -> None:
    output = torch.tensor([[[1.0, 3.0], [4.0, 1.0]]])
    method = Migu(MiguConfig())
    assert method.magnitudes(output, torch.tensor([[True, False]])).tolist() == [0.25, 0.75]


class Layer(nn.Module):
    """One linear layer with bias, called like a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 4)
        self.norm = nn.LayerNorm(4)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 0.5]]))
            self.layer.bias.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.norm(self.layer(input_ids))
        return found


def begun(ctx: FakeContext, **settings: Any) -> Migu:
    method = Migu(MiguConfig(**{"mask_ratio": 0.5, "statistic": "sum", **settings}))
    method.train_begin(ctx)
    return method


def masked(method: Migu, ctx: FakeContext) -> FakeGradients:
    grads = FakeGradients({name: torch.ones_like(weight) for name, weight in ctx.weights().items()})
    method.gradients(ctx, grads)
    return grads


def test_rows_of_small_units_get_no_gradient_and_nothing_else_is_touched() -> None:
    ctx = FakeContext(Layer().train(), earlier=["t0"])
    method = begun(ctx)
    ctx.model(torch.ones(1, 1, 2))  # type: ignore[misc]
    grads = masked(method, ctx)
    assert grads["layer.weight"].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert grads["layer.bias"].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert grads.written == {"layer.weight", "layer.bias"}
    assert ctx.logged["migu_updated"] == 0.5


def test_all_micro_batches_of_a_step_count_and_none_of_the_step_before() -> None:
    ctx = FakeContext(Layer().train(), earlier=["t0"])
    method = begun(ctx)
    x = torch.tensor([[[10.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    for part in x:
        ctx.model(part)  # type: ignore[misc]
    assert method._magnitudes["layer"].tolist() == [10.0, 3.0, 20.0, 0.5]
    assert masked(method, ctx)["layer.bias"].tolist() == [1.0, 0.0, 1.0, 0.0]
    ctx.model(x[1])  # type: ignore[misc]
    assert masked(method, ctx)["layer.bias"].tolist() == [0.0, 1.0, 0.0, 1.0]  # (0, 3, 0, .5)


def test_ranks_decide_together() -> None:
    """Rank 0 sees (10, 0, 20, 0), rank 1 (0, 60, 0, 10): together (10, 60, 20, 10)."""
    parts = [torch.tensor([[[10.0, 0.0]]]), torch.tensor([[[0.0, 20.0]]])]

    def make(rank: int, size: int) -> FakeContext:
        return FakeContext(Layer().train(), earlier=["t0"], rank=rank, world_size=size)

    def work(ctx: FakeContext) -> list[float]:
        method = begun(ctx)
        ctx.model(parts[ctx.rank])  # type: ignore[misc]
        found: list[float] = masked(method, ctx)["layer.bias"].tolist()
        return found

    assert on_ranks(2, make, work) == [[0.0, 1.0, 1.0, 0.0]] * 2


def test_first_task_and_evaluation_touch_nothing() -> None:
    ctx = FakeContext(Layer().train())
    method = begun(ctx)
    ctx.model(torch.ones(1, 1, 2))  # type: ignore[misc]
    assert masked(method, ctx).written == set()

    ctx = FakeContext(Layer().train(), earlier=["t0"])
    method = begun(ctx)
    ctx.model(torch.tensor([[[0.0, 1.0]]]))  # type: ignore[misc]
    ctx.model.eval()(torch.tensor([[[100.0, 0.0]]]))  # type: ignore[union-attr]
    assert masked(method, ctx)["layer.weight"][1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_counts_once(tmp_path: Any, reentrant: bool) -> None:
    """The forward that backward runs again must not enter the next step's statistic."""
    stage_adapter(tmp_path)
    found = []
    for checkpointing in (False, True):
        model = continued(tmp_path)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ctx = PeftNames(model, earlier=["t0"])
        method = begun(ctx)
        ids = torch.tensor([[1, 2, 3, 4]])
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: tensor.clone() for name, tensor in method._magnitudes.items()})
        assert not method._counting
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 12  # A and B of three layers in two blocks
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], rtol=1e-5), name


class PeftNames(FakeContext):
    """Names the parameters as the session does."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        assert self.model is not None
        return {parameter_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}


def test_sgd_leaves_masked_rows_as_they_are(tmp_path: Any) -> None:
    stage_adapter(tmp_path)
    model = continued(tmp_path)
    ctx = PeftNames(model, earlier=["t0"])
    method = begun(ctx, mask_ratio=0.7)
    before = {name: weight.clone() for name, weight in ctx.weights().items()}
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    grads = FakeGradients({name: p.grad for name, p in ctx.parameters.items() if p.grad is not None})
    method.gradients(ctx, grads)
    for name, parameter in ctx.parameters.items():
        parameter.grad = grads[name]
    torch.optim.SGD(ctx.parameters.values(), lr=0.1).step()
    for name, weight in ctx.weights().items():
        moved = (weight != before[name]).any(dim=1)
        units = len(moved)
        assert 1 <= int(moved.sum()) <= units - -(-7 * (units - 1) // 10), name


def test_full_fine_tuning_masks_linear_layers_and_leaves_the_rest() -> None:
    model = language_model().train()
    ctx = FakeContext(model, earlier=["t0"])
    method = begun(ctx)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids)
    written = masked(method, ctx).written
    assert "model.layers.0.self_attn.q_proj.weight" in written
    assert "model.layers.0.self_attn.q_proj.bias" in written
    assert not any("norm" in name or "embed" in name for name in written)


def test_a_head_that_is_tied_to_the_embedding_is_trained_whole() -> None:
    model = language_model().train()
    model.lm_head.weight = model.model.embed_tokens.weight
    ctx = FakeContext(model, earlier=["t0"])
    method = begun(ctx)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids)
    written = masked(method, ctx).written
    assert "model.layers.0.self_attn.q_proj.weight" in written
    assert not any("embed" in name or "head" in name for name in written)


class Head(nn.Module):
    """An output head that runs on the last positions only, as ms-swift lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0], [3.0]]))

    def forward(self, input_ids: Tensor, logits_to_keep: Any = None) -> Tensor:
        found: Tensor = self.head(input_ids.float()[:, -logits_to_keep:].unsqueeze(-1))
        return found


@pytest.mark.parametrize("keep", [3, 4])
def test_a_head_on_some_positions_counts_those_that_predict_an_answer(keep: int) -> None:
    """Inputs 1 to 5, labels at the last two, cut as ms-swift cuts them: 3 and 4 predict them, and sum up to 7."""
    ctx = FakeContext(Head().train(), earlier=["t0"])
    method = begun(ctx, statistic="sum")
    ids, labels = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[-100, -100, -100, 8, 9]])
    with method.forward(ctx, {"labels": labels[:, -keep:]}):
        ctx.model(input_ids=ids, logits_to_keep=keep)  # type: ignore[misc]
    assert method._magnitudes["head"].tolist() == [7.0, 21.0]


def test_the_model_is_left_clean() -> None:
    ctx = FakeContext(Layer().train(), earlier=["t0"])
    method = begun(ctx)
    method.end_task(ctx)
    assert all(not module._forward_hooks for module in ctx.model.modules())  # type: ignore[union-attr]
    assert not ctx.model._forward_pre_hooks  # type: ignore[union-attr]


@pytest.mark.slow
def test_in_training_every_forward_is_seen(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method without a term of its own for the loss has its `forward` called too."""
    seen: list[Any] = []
    original = Migu.forward
    monkeypatch.setattr(Migu, "forward", lambda *args: (seen.append(args), original(*args))[1])
    train_stage("migu", "2022", tmp_path / "1", max_steps=2)
    assert len(seen) == 2


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan")])
def test_values_out_of_range(ratio: float) -> None:
    with pytest.raises(UserError, match="--migu_mask_ratio is"):
        MiguConfig(mask_ratio=ratio).validate()
    MiguConfig(mask_ratio=0.0).validate()


def test_magnitudes_are_added_up_in_fp32() -> None:
    """301 ones; bf16 knows 300 and 302."""
    found = Migu(MiguConfig(statistic="sum")).magnitudes(torch.ones(1, 301, 1, dtype=torch.bfloat16), None)
    assert found.tolist() == [301.0]


TOKENS = torch.tensor([[[10.0, 0.0], [0.0, 1.0]]])
"""Two tokens of `Layer`: (10, 0, 20, 0) and (0, 3, 0, .5)."""


def test_tokens_of_all_rows_count() -> None:
    ctx = FakeContext(Layer().train(), earlier=["t0"])
    method = begun(ctx)
    ctx.model(TOKENS.transpose(0, 1))  # type: ignore[misc]
    assert method._magnitudes["layer"].tolist() == [10.0, 3.0, 20.0, 0.5]


def test_the_attention_mask_of_the_forward_says_what_is_padding() -> None:
    ctx = FakeContext(Layer().train(), earlier=["t0"])
    method = begun(ctx)
    ctx.model(TOKENS, attention_mask=torch.tensor([[1, 0]]))  # type: ignore[misc]
    assert method._magnitudes["layer"].tolist() == [10.0, 0.0, 20.0, 0.0]
    assert not method._magnitudes["layer"].requires_grad


def test_a_mask_of_other_positions_is_none() -> None:
    """One of image patches, or of pairs of tokens."""
    for mask in (torch.tensor([[1, 0, 1]]), torch.zeros(1, 1, 2, 2)):
        ctx = FakeContext(Layer().train(), earlier=["t0"])
        method = begun(ctx)
        ctx.model(TOKENS, attention_mask=mask)  # type: ignore[misc]
        assert method._magnitudes["layer"].tolist() == [10.0, 3.0, 20.0, 0.5]


def test_a_layer_that_sees_all_tokens_counts_the_prompt_too() -> None:
    ctx = FakeContext(Layer().train(), earlier=["t0"])
    method = begun(ctx)
    with method.forward(ctx, {"labels": torch.tensor([[-100, 7]])}):
        ctx.model(TOKENS, attention_mask=torch.ones(1, 2))  # type: ignore[misc]
    assert method._magnitudes["layer"].tolist() == [10.0, 3.0, 20.0, 0.5]


@pytest.mark.parametrize("inputs", [{}, {"labels": torch.tensor([1])}])
def test_labels_of_the_batch_before_and_of_whole_rows_say_nothing_of_tokens(inputs: dict[str, Tensor]) -> None:
    ctx = FakeContext(Layer().train(), earlier=["t0"])
    method = begun(ctx)
    with method.forward(ctx, {"labels": torch.tensor([[-100, 7]])}):
        pass
    with method.forward(ctx, inputs):
        ctx.model(TOKENS)  # type: ignore[misc]
    assert method._magnitudes["layer"].tolist() == [10.0, 3.0, 20.0, 0.5]


def test_a_step_that_the_loss_scaler_skipped_leaves_nothing() -> None:
    ctx = FakeContext(Layer().train(), earlier=["t0"])
    method = begun(ctx)
    ctx.model(TOKENS[:, :1])  # type: ignore[misc]
    method.window(ctx, [])
    ctx.model(TOKENS[:, 1:])  # type: ignore[misc]
    assert masked(method, ctx)["layer.bias"].tolist() == [0.0, 1.0, 0.0, 1.0]  # (0, 3, 0, .5)


def test_a_layer_that_no_rank_called_is_trained_whole() -> None:
    ctx = FakeContext(Layer().train(), earlier=["t0"])
    method = begun(ctx)
    assert masked(method, ctx)["layer.bias"].tolist() == [1.0] * 4


def test_what_is_logged_is_the_share_of_all_units() -> None:
    """Ratio .5: two of four units and, their median being one of them, two of three; 4 / 7."""
    ctx = FakeContext(nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 3)).train(), earlier=["t0"])
    method = begun(ctx)
    for ctx.is_logging_step in (False, True):
        assert ctx.logged == {}
        ctx.model(torch.ones(1, 1, 1))  # type: ignore[misc]
        masked(method, ctx)
    assert ctx.logged["migu_updated"] == pytest.approx(4 / 7)
