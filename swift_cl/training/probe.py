"""What a stage answers right after its training: recorded in stage.json, compared before it is scored.

One forward on one short question of the stage's own task. `swift_cl.evaluation.identity` asks the served adapter the
same and refuses to score another one in its place.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LONGEST = 500
"""Characters of the question that are kept."""
TOP = 5
FALLBACK = "Hello!"


def probe_messages(rows: Sequence[Mapping[str, Any]], system: str | None) -> list[dict[str, str]]:
    """The first question of the training rows under the stage's system prompt."""
    said = (message["content"] for row in rows[:1] for message in row["messages"] if message["role"] == "user")
    question = next((text for text in said if isinstance(text, str) and text.strip()), FALLBACK)[:LONGEST]
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": question}]


def record_probe(
    model: Any, template: Any, messages: list[dict[str, str]], weights: Mapping[Tensor, Tensor], device: Any
) -> dict[str, Any]:
    """`{"messages", "logprobs"}`: natural logarithms of the likeliest first tokens' probabilities, by token.

    Every rank must call it (under ZeRO-3 a forward gathers the weights).

    Args:
        weights: live parameter -> exported tensor, for methods that export other weights than they train.
    """
    with _inference(model, template), torch.no_grad(), _exchanged(weights):
        encoded = template.encode({"messages": [dict(message) for message in messages]})
        ids = torch.tensor([encoded["input_ids"]], device=device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    logprobs, tokens = torch.log_softmax(logits.float(), -1).topk(TOP)
    named = zip(tokens.tolist(), logprobs.tolist(), strict=True)
    return {"messages": messages, "logprobs": {template.tokenizer.decode(token): value for token, value in named}}


@contextlib.contextmanager
def _inference(model: Any, template: Any) -> Iterator[None]:
    mode, training = template.mode, model.training
    template.set_mode("transformers")
    model.eval()
    try:
        yield
    finally:
        template.set_mode(mode)
        model.train(training)


@contextlib.contextmanager
def _exchanged(weights: Mapping[Tensor, Tensor]) -> Iterator[None]:
    before = {live: live.detach().clone() for live in weights}
    for live, exported in weights.items():
        live.copy_(exported)
    try:
        yield
    finally:
        for live, kept in before.items():
            live.copy_(kept)
