"""Gradient checkpointing: which of torch's two forms runs when, and what ms-swift leaves behind in torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.utils.checkpoint
import transformers.modeling_utils

_PATCHED = "_old_checkpoint"
_FUNCTION = "_gradient_checkpointing_func"


def _original() -> Any:
    return getattr(torch.utils.checkpoint, _PATCHED, torch.utils.checkpoint.checkpoint)


@contextmanager
def own_checkpointing() -> Iterator[None]:
    """Take back ms-swift's patch at the end of a stage.

    It fixes use_reentrant in torch for the rest of the process, at the first Trainer; the next stage of a chain may
    need the other value.
    """
    try:
        yield
    finally:
        if hasattr(torch.utils.checkpoint, _PATCHED):
            original = _original()
            torch.utils.checkpoint.checkpoint = original
            transformers.modeling_utils.checkpoint = original
            delattr(torch.utils.checkpoint, _PATCHED)


@contextmanager
def differentiable_checkpointing(model: Any) -> Iterator[None]:
    """Checkpoint in the non-reentrant form while the block runs.

    Only that form allows `torch.autograd.grad` on part of the graph. Training keeps the form that was chosen for it:
    the non-reentrant one costs about 7 % of a step on the CPU (`tests/benchmarks/step_cost.py`), so a method that needs
    it once a task must not pay for it at every step. Remote model code calls torch's function by its name.
    """
    checkpoint = partial(_original(), use_reentrant=False)

    def without_reentrant(*args: Any, use_reentrant: bool | None = None, **kwargs: Any) -> Any:
        return checkpoint(*args, **kwargs)

    modules = [module for module in model.modules() if hasattr(module, _FUNCTION)]
    before = [getattr(module, _FUNCTION) for module in modules]
    named = torch.utils.checkpoint.checkpoint
    try:
        for module in modules:
            setattr(module, _FUNCTION, without_reentrant)
        torch.utils.checkpoint.checkpoint = without_reentrant
        yield
    finally:
        torch.utils.checkpoint.checkpoint = named
        for module, function in zip(modules, before, strict=True):
            setattr(module, _FUNCTION, function)
