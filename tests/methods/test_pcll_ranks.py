"""pcll with several ranks and in low precision: nobody leaves out a forward that others take part in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swift_cl.methods._latent import Heads
from tests.methods.test_pcll import SIZE, WIDTH, batch, loss_of, second_stage


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_rank_without_generated_rows_asks_the_teacher_where_another_has_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """Under ZeRO-3 a forward needs all ranks; what this rank's stand-in says counts nothing."""
    method, ctx, model = second_stage(tmp_path)
    asked, logits = [], method._teacher.logits  # type: ignore[union-attr]

    def counted(given: Any, inputs: dict[str, Tensor]) -> Tensor:
        asked.append(len(inputs["labels"]))
        return logits(given, inputs)

    monkeypatch.setattr(method._teacher, "logits", counted)
    channels = ["new/qa"] * 4
    alone = loss_of(method, ctx, model, batch(), channels)
    assert asked == []
    if elsewhere:
        from swift_cl.methods import _code_loss

        monkeypatch.setattr(_code_loss, "asked_in", lambda ctx, batches, wanted: [True] * len(batches))
    again = loss_of(method, ctx, model, batch(), channels)
    assert asked == ([1] if elsewhere else [])
    assert torch.equal(alone, again)


def test_heads_in_the_dtype_of_an_engine() -> None:
    """DeepSpeed casts all of a module to bf16; what the heads say stays fp32, and nearly the same."""
    torch.manual_seed(0)
    heads, mask = Heads(WIDTH, SIZE), torch.ones(2, 3)
    given = (torch.randn(2, 3, WIDTH), mask, mask, torch.randn(2, SIZE))
    exact = heads(*given)
    rounded = heads.to(torch.bfloat16)(*given)
    for one, two in zip(exact, rounded, strict=True):
        assert two.dtype == torch.float32
        assert torch.allclose(one, two, rtol=0.05, atol=0.02)
