"""Gradient checkpointing: the form that allows torch.autograd.grad, only inside its block."""

from typing import Any

import pytest
import torch

from swift_cl.training.checkpointing import differentiable_checkpointing, own_checkpointing
from tests.support.language_model import tiny_lora_model


def gradient(model: Any) -> tuple[torch.Tensor, ...]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits = model(input_ids=torch.arange(6)[None]).logits
    return torch.autograd.grad(logits.square().sum(), parameters)


def reentrant_model() -> Any:
    model = tiny_lora_model()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model


def test_part_of_the_graph_can_be_differentiated_inside_only() -> None:
    model, plain = reentrant_model(), tiny_lora_model()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not have been used"):
            gradient(model)
        with differentiable_checkpointing(model):
            found = gradient(model)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, gradient(plain), strict=True))


def test_model_code_that_calls_torch_by_name() -> None:
    """As the remote code of Baichuan does; and ms-swift's patch forces the reentrant form for such calls."""
    original = torch.utils.checkpoint.checkpoint

    def patched(*args: Any, use_reentrant: Any = None, **kwargs: Any) -> Any:
        return original(*args, use_reentrant=True, **kwargs)

    x = torch.ones(1, requires_grad=True)
    with own_checkpointing():
        torch.utils.checkpoint._old_checkpoint = original  # type: ignore[attr-defined]
        torch.utils.checkpoint.checkpoint = patched
        with differentiable_checkpointing(torch.nn.Linear(1, 1)):
            y = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True)
            (slope,) = torch.autograd.grad(y, x)
        assert torch.utils.checkpoint.checkpoint is patched
    assert slope.item() == pytest.approx(torch.cos(torch.ones(1)).item())
    assert torch.utils.checkpoint.checkpoint is original
    assert not hasattr(torch.utils.checkpoint, "_old_checkpoint")


def test_without_checkpointing_nothing_is_recomputed() -> None:
    model = tiny_lora_model()
    calls = []
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *args: calls.append(1))
    with differentiable_checkpointing(model):
        gradient(model)
    assert calls == [1]
