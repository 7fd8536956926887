"""slao against hand-computed numbers: the orthonormal start, the merge, and what travels from task to task."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from swift_cl.errors import UserError
from swift_cl.io import MethodState, load_method_state, save_method_state
from swift_cl.methods.slao import Slao, SlaoConfig, orthonormal_rows
from tests.support.fake_context import FakeContext
from tests.support.lora_pair import LoraPair

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def task(index: int, a: Tensor, b: Tensor, state: MethodState | None) -> tuple[dict[str, Tensor], MethodState]:
    """What is kept, and the state, of a task whose training ends at a and b."""
    ctx = FakeContext(LoraPair(a, b), earlier=[f"t{i}" for i in range(index)], state=state)
    method = Slao(SlaoConfig())
    return method.export(ctx, ctx.weights()), method.end_task(ctx)


def test_start_is_an_orthonormal_basis_of_the_last_rows() -> None:
    found = orthonormal_rows(torch.tensor([[3.0, 4.0], [0.0, 5.0]]), A)
    assert found.tolist() == [pytest.approx([0.6, 0.8]), pytest.approx([-0.8, 0.6])]


def test_a_wide_matrix_keeps_its_row_space() -> None:
    torch.manual_seed(1)
    a = torch.randn(3, 8)
    q = orthonormal_rows(a, A)
    assert torch.allclose(q @ q.T, torch.eye(3), atol=1e-6)
    assert torch.allclose(a @ q.T @ q, a, atol=1e-5)
    assert (a @ q.T).diagonal().min() > 0  # the sign of each row is that of its own direction


def test_more_rows_than_inputs_are_refused() -> None:
    with pytest.raises(UserError, match=r"--lora_rank is 3, but .* has 2 inputs"):
        orthonormal_rows(torch.randn(3, 2), A)


def test_merge_of_three_tasks() -> None:
    """B of 8, 2, 5: 8; 8 - 6 / sqrt 2; that + (5 - that) / sqrt 3."""
    state = None
    kept = []
    for index, value in enumerate((8.0, 2.0, 5.0)):
        weights, state = task(index, torch.eye(2) * (index + 1), torch.full((1, 2), value), state)
        assert weights[A].tolist() == (torch.eye(2) * (index + 1)).tolist()  # A is the new one, never averaged
        kept.append(weights[B][0, 0].item())
    assert kept == pytest.approx([8.0, 3.757359, 4.474798], abs=1e-6)
    assert kept[1] == pytest.approx(8 - 6 / math.sqrt(2))


def test_the_next_task_starts_from_the_trained_weights_and_not_from_the_merge(tmp_path: Path) -> None:
    _, state = task(0, torch.eye(2), torch.tensor([[8.0, 8.0]]), None)
    kept, state = task(1, torch.tensor([[3.0, 4.0], [0.0, 5.0]]), torch.tensor([[2.0, 1.0]]), state)
    save_method_state(tmp_path, "slao", state)
    # The stage loads what was kept; the method then sets what was trained.
    model = LoraPair(kept[A], kept[B])
    ctx = FakeContext(model, earlier=["t0", "t1"], state=load_method_state(tmp_path, "slao"))
    assert Slao(SlaoConfig()).prepare_model(ctx, model) is model
    assert ctx.weights()[A].tolist() == [pytest.approx([0.6, 0.8]), pytest.approx([-0.8, 0.6])]
    assert ctx.weights()[B].tolist() == [[2.0, 1.0]]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_first_task_is_plain() -> None:
    model = LoraPair(torch.tensor([[3.0, 4.0], [0.0, 5.0]]), torch.ones(1, 2))
    ctx = FakeContext(model)
    before = {name: weight.clone() for name, weight in ctx.weights().items()}
    method = Slao(SlaoConfig())
    method.prepare_model(ctx, model)
    after = method.export(ctx, ctx.weights())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_merge_keeps_the_type_of_the_file_and_counts_in_fp32() -> None:
    _, state = task(0, torch.eye(2), torch.full((1, 2), 8.0), None)
    ctx = FakeContext(LoraPair(torch.eye(2), torch.full((1, 2), 2.0)), earlier=["t0"], state=state)
    low = {name: weight.bfloat16() for name, weight in ctx.weights().items()}
    kept = Slao(SlaoConfig()).export(ctx, low)
    assert kept[B].dtype == torch.bfloat16
    assert state.tensors[f"merged/{B}"].dtype == torch.float32


def test_what_is_no_lora_matrix_is_refused() -> None:
    model = LoraPair(torch.eye(2), torch.ones(1, 2))
    model.bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="these are trained too: bias"):
        Slao(SlaoConfig()).prepare_model(FakeContext(model), model)


def test_another_rank_is_refused() -> None:
    _, state = task(0, torch.eye(2), torch.ones(1, 2), None)
    model = LoraPair(torch.ones(3, 4), torch.ones(1, 3))
    with pytest.raises(UserError, match="does not fit the trained parameters"):
        Slao(SlaoConfig()).prepare_model(FakeContext(model, earlier=["t0"], state=state), model)
