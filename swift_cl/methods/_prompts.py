"""Forwards over prompts, in training and when routing: padded batches, a value a row, which tokens are the question."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_cl.io import sha256_json
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapters import AdapterSwitch
from swift_cl.methods._embeddings import _last_hidden
from swift_cl.methods._routing import RouteContext, RouteRequest
from swift_cl.methods.base import TaskContext, TrainingRow
from swift_cl.progress import with_bar

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

Message = Mapping[str, Any]
ROWS_AT_ONCE = 4
"""Rows in one forward when a stage ends: not the training's batch, padding to which would change the last bits."""


def padded(rows: Sequence[Sequence[int]], device: Any) -> "tuple[Tensor, Tensor]":
    """(ids, mask) [rows, longest], padded on the right."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids.to(device), mask.to(device)


def first_question(row: TrainingRow) -> list[Message]:
    """A row's messages up to its first question, which is what a router sees: no answer."""
    messages: list[Message] = row["messages"]
    last = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    return list(messages[: last + 1])


def without_text(messages: Sequence[Message]) -> list[Message]:
    """The same messages with an empty last question: what the template writes around it."""
    return [*messages[:-1], {**messages[-1], "content": ""}]


def span_of_question(ids: Sequence[int], empty: Sequence[int]) -> tuple[int, int]:
    """First and last + 1 position of what is not the template's, by the longest common prefix and suffix.

    Args:
        empty: the encoding of the same prompt with an empty question.

    Returns:
        A span that begins at 1 or later (the first token has nothing before it that could predict it); the whole rest
        of the prompt where nothing differs.
    """
    shorter = min(len(ids), len(empty))
    prefix = next((i for i in range(shorter) if ids[i] != empty[i]), shorter)
    most = shorter - prefix
    suffix = next((i for i in range(most) if ids[-1 - i] != empty[-1 - i]), most)
    start, end = max(prefix, 1), len(ids) - suffix
    return (start, end) if start < end else (1, len(ids))


def shared_systems(rows: Sequence[TrainingRow], stage_system: str | None) -> set[str | None]:
    """System prompts that no question brings along at inference: the stage's, or one that all rows share, which is then
    the stage's or the template's."""
    heads = [row["messages"][0] for row in rows]
    systems = {str(head["content"]) if head["role"] == "system" else None for head in heads}
    return {stage_system} if stage_system is not None or len(systems) > 1 else systems


def questions_alone(rows: Sequence[TrainingRow], stage_system: str | None) -> list[list[Message]]:
    """Each row's first question as `RouteRequest.without_stage` gives it: under the row's own system prompt or none."""
    shared = shared_systems(rows, stage_system)
    found = []
    for row in rows:
        messages = first_question(row)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        found.append([{"role": "system", "content": "" if system in shared else system or ""}, *messages])
    return found


def last_token_features(model: Any, prompts: Sequence[Sequence[int]], device: Any) -> "Tensor":
    """Last hidden state, after the final norm, of each prompt's last token, fp32 [rows, width]."""
    ids, mask = padded(prompts, device)
    hidden = _last_hidden(model, {"input_ids": ids, "attention_mask": mask})
    return hidden[torch.arange(len(ids), device=hidden.device), mask.sum(dim=1) - 1].float()


def routed_features(
    ctx: RouteContext, who: str, folder: Path | None, requests: Sequence[RouteRequest], at_once: int
) -> "Tensor":
    """`last_token_features` of questions under no stage's system prompt, [rows, width] on the CPU; a question that an
    earlier call had is not computed again.

    Args:
        who: the method's name, for the cache.
        folder: the adapter that looks at them; None for the untouched base model.
        at_once: questions in one forward.
    """
    asked = [request.without_stage() for request in requests]
    looks = None if folder is None else ctx.adapter_sha256(folder)
    keys = [sha256_json([who, looks, [dict(m) for m in messages]]) for messages in asked]
    prompts = {key: ctx.encode(messages) for key, messages in zip(keys, asked, strict=True) if key not in ctx.cache}
    order = sorted(prompts, key=lambda key: len(prompts[key]))
    with ctx.model_with(folder) as model:
        for start in range(0, len(order), at_once):
            batch = order[start : start + at_once]
            rows = last_token_features(model, [prompts[key] for key in batch], ctx.device).cpu()
            ctx.cache.update(zip(batch, rows, strict=True))
    return torch.stack([ctx.cache[key] for key in keys])


def task_features(ctx: TaskContext, rows: Sequence[TrainingRow]) -> "Tensor":
    """What `routed_features` gives for the questions of training rows: the base model's, fp32 [rows, width] on the CPU;
    every rank must call it."""
    prompts = ctx.encode_prompts(questions_alone(rows, ctx.system))

    def compute(batch: list[int]) -> "Tensor":
        return last_token_features(ctx.module_for_forward, [prompts[i] for i in batch], ctx.device)

    with AdapterSwitch(ctx.model).active():
        return over_rows(ctx, len(prompts), ROWS_AT_ONCE, compute).cpu()


def over_rows(ctx: TaskContext, count: int, at_once: int, compute: "Callable[[list[int]], Tensor]") -> "Tensor":
    """A vector for each of `count` rows, fp32 [count, width]; every rank must call it.

    Batches, not rows, are dealt to the ranks, so that their composition, and with it the result, is that of one rank.

    Args:
        compute: positions of rows -> [their number, width].
    """
    batches = [list(range(start, min(start + at_once, count))) for start in range(0, count, at_once)]
    result: Tensor | None = None
    with torch.no_grad(), ctx.statistics_mode():
        turns = range(0, len(batches), ctx.world_size)
        for first in with_bar(turns, "looking at the questions", "batch", shown=ctx.rank == 0):
            # Under ZeRO-3 a forward needs all ranks, so one without a batch repeats the first and discards it.
            number = first + ctx.rank
            own = number if number < len(batches) else 0
            vectors = compute(batches[own]).float()
            if result is None:
                result = torch.zeros(count, vectors.shape[1], device=ctx.device)
            if number < len(batches):
                result[batches[own]] = vectors.to(ctx.device)
    return torch.zeros(0, 1) if result is None else ctx.all_reduce_sum(result)


def mean_nll(model: Any, prompts: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]], device: Any) -> "Tensor":
    """For each prompt the mean of -log p(token | tokens before it) over its span, fp32 [rows]."""
    ids, mask = padded(prompts, device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.stack(
        [
            torch.nn.functional.cross_entropy(logits[row, start - 1 : end - 1].float(), ids[row, start:end])
            for row, (start, end) in enumerate(spans)
        ]
    )
