"""Sampling from a model in training, between two of its steps: batched, each row a function of its own seed.

Imports torch: import it when it is needed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from swift_cl.distributed import is_partitioned


class RowNoise(LogitsProcessor):
    """Turns the largest logit into a draw: argmax(z / T + Gumbel noise) has the probabilities softmax(z / T).

    Every row has a generator of its own, so what it draws does not depend on the rows beside it, on the size of the
    batch, or on the process that draws it.

    Args:
        seeds: one a row.
        temperature: T > 0.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: Any) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noisy = scores.float() / self._temperature
        for row, generator in zip(noisy, self._generators, strict=True):
            uniform = torch.rand(len(row), generator=generator, device=row.device, dtype=torch.float64)
            row -= (-uniform.clamp(min=1e-300).log()).log().float()
        return noisy


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    temperature: float,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    at_once: int,
    rounds: int = 0,
) -> list[list[int]]:
    """A continuation of every prompt, its stop token included where there is one; in eval mode, without gradients.

    Args:
        model: left in the mode in which it was.
        seeds: one a prompt.
        temperature: 0 for the likeliest token each time.
        at_once: prompts in one batch.
        rounds: the most batches that any rank has. Where weights are spread over ranks, every rank must take part in
            every one of them, and one whose answers have ended goes on until those of all have.
    """
    found: list[list[int]] = [[] for _ in prompts]
    # Prompts of like length side by side: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    training = model.training
    together = any(map(is_partitioned, model.parameters()))
    model.eval()
    try:
        for number in range(max(rounds, -(-len(order) // at_once))):
            batch = order[number * at_once :][:at_once]
            extra = not batch
            batch = batch or order[:1]
            ids, mask = padded_left([prompts[i] for i in batch], _device(model))
            noise = [RowNoise([seeds[i] for i in batch], temperature, ids.device)] if temperature > 0 else []
            with torch.no_grad():
                answers = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    logits_processor=noise,
                    generation_config=_plain(max_new_tokens, stop_tokens),
                    synced_gpus=together or None,  # None: transformers knows of ZeRO-3, but not of accelerate's FSDP2
                )
            if extra:
                continue
            for i, answer in zip(batch, answers[:, ids.shape[1] :].tolist(), strict=True):
                found[i] = cut(answer, stop_tokens)
    finally:
        model.train(training)
    return found


def _device(model: Any) -> Any:
    return next(model.parameters()).device


def _plain(max_new_tokens: int, stop_tokens: Sequence[int]) -> GenerationConfig:
    """Nothing that changes the distribution: what is not set here, transformers takes from the model's folder."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_tokens),
        pad_token_id=stop_tokens[0],
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
    )


def cut(answer: Sequence[int], stop_tokens: Sequence[int]) -> list[int]:
    """The tokens up to and with the first that ends an answer."""
    end = next((i for i, token in enumerate(answer) if token in stop_tokens), len(answer) - 1)
    return list(answer[: end + 1])


def padded_left(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """(ids, mask) [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.tensor(row)
        mask[number, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)
