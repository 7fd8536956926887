"""What the model makes of a prompt, as one vector a row."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swift_cl.methods.base import TaskContext, TrainingRow
from swift_cl.progress import with_bar

if TYPE_CHECKING:
    import torch
else:
    from swift_cl.lazy import LazyModule

    torch = LazyModule("torch")

# Not taken from the training's batch size: padding changes the last bits, and the choice of rows must not follow them.
_ROWS_AT_ONCE = 4


def prompt_embeddings(ctx: TaskContext, rows: Sequence[TrainingRow]) -> "torch.Tensor":
    """Mean of the last hidden state over a row's prompt tokens, fp32 [rows, width]; every rank must call it.

    Batches, not rows, are dealt to the ranks, so that their composition, and with it the result, is that of one rank.
    """
    batches = [range(start, min(start + _ROWS_AT_ONCE, len(rows))) for start in range(0, len(rows), _ROWS_AT_ONCE)]
    result: torch.Tensor | None = None
    with torch.no_grad(), ctx.statistics_mode():
        turns = range(0, len(batches), ctx.world_size)
        for first in with_bar(turns, "embedding the questions", "batch", shown=ctx.rank == 0):
            # Under ZeRO-3 a forward needs all ranks, so one without a batch repeats the first and discards it.
            number = first + ctx.rank
            own = number if number < len(batches) else 0
            vectors = _embed(ctx, ctx.encode([rows[i] for i in batches[own]]))
            if result is None:
                result = torch.zeros(len(rows), vectors.shape[1], device=ctx.device)
            if number < len(batches):
                result[batches[own].start : batches[own].stop] = vectors
    if result is None:
        return torch.zeros(0, 1)
    return ctx.all_reduce_sum(result)


def _embed(ctx: TaskContext, encoded: Sequence[dict[str, Any]]) -> "torch.Tensor":
    inputs = dict(ctx.collate(encoded))
    if len(inputs["labels"]) != len(encoded):  # a padding-free collator joins rows into one: give it one at a time
        return torch.cat([_embed(ctx, [row]) for row in encoded])
    labels = inputs.pop("labels")
    hidden = _last_hidden(ctx.module_for_forward, inputs).float()
    attended = inputs.get("attention_mask")
    attended = torch.ones_like(labels) if attended is None else attended
    prompt = attended.bool() & (labels == -100)
    # A row without prompt tokens is described by all it has.
    mask = torch.where(prompt.any(dim=1, keepdim=True), prompt, attended.bool()).unsqueeze(-1)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _last_hidden(module: Any, inputs: dict[str, Any]) -> "torch.Tensor":
    """One forward that keeps neither the other layers' states nor, where the model can leave them out, the logits."""
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _arguments: Any, output: Any) -> None:
        kept.append(output.last_hidden_state)

    handle = module.get_decoder().register_forward_hook(keep)
    try:
        module(**inputs, **last_logits(module, 1), use_cache=False)
    finally:
        handle.remove()
    return kept[-1]


def last_logits(module: Any, count: int) -> dict[str, int]:
    """What a forward must be told so that it computes the logits of the last positions alone; nothing where the model
    cannot leave the others out."""
    known = "logits_to_keep" in inspect.signature(_innermost(module).forward).parameters
    return {"logits_to_keep": count} if known else {}


def _innermost(module: Any) -> Any:
    return module.get_base_model() if hasattr(module, "get_base_model") else module
