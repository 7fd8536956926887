"""What a stage answers right after its training: recorded in stage.json, compared before it is scored.

One forward on one short question of the stage's own task. `swift_cl.evaluation.identity` asks the served adapter the
same and refuses to score another one in its place.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from swift_cl.methods._adapters import AdapterSwitch, load_frozen_adapter
from swift_cl.stream.images import MARK

LONGEST = 500
"""Characters of the question that are kept."""
TOP = 5
FALLBACK = "Hello!"
_KEPT = "cl_kept"


def probe_messages(rows: Sequence[Mapping[str, Any]], system: str | None) -> list[dict[str, str]]:
    """The first question of the training rows, without its images, under the stage's system prompt."""
    said = (message["content"] for row in rows[:1] for message in row["messages"] if message["role"] == "user")
    texts = (text.replace(MARK, "") for text in said if isinstance(text, str))
    question = next((text for text in texts if text.strip()), FALLBACK)[:LONGEST]
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": question}]


def record_probe(model: Any, template: Any, messages: list[dict[str, str]], device: Any) -> dict[str, Any]:
    """`{"messages", "logprobs"}`: natural logarithms of the likeliest first tokens' probabilities, by token.

    Every rank must call it (under ZeRO-3 a forward gathers the weights).
    """
    with _inference(model), inference_template(template), torch.no_grad():
        encoded = template.encode({"messages": [dict(message) for message in messages]})
        ids = torch.tensor([encoded["input_ids"]], device=device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **_decoder_start(model, ids)).logits[0, -1]
    logprobs, tokens = torch.log_softmax(logits.float(), -1).topk(TOP)
    named = zip(tokens.tolist(), logprobs.tolist(), strict=True)
    return {"messages": messages, "logprobs": {template.tokenizer.decode(token): value for token, value in named}}


def _decoder_start(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the decoder of an encoder-decoder model is given to say its first token; nothing for other models."""
    config = getattr(model, "module", model).config
    if not getattr(config, "is_encoder_decoder", False):
        return {}
    return {"decoder_input_ids": torch.full_like(ids[:, :1], config.decoder_start_token_id)}


@contextlib.contextmanager
def _inference(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def inference_template(template: Any) -> Iterator[None]:
    """Within the block the template writes prompts as at inference: generation prompt at the end, no labels."""
    mode = template.mode
    template.set_mode("transformers")
    try:
        yield
    finally:
        template.set_mode(mode)


@contextlib.contextmanager
def kept_adapter(model: Any, folder: Path) -> Iterator[None]:
    """Let forwards in the block use the adapter of `folder` alone: what a method keeps may differ from what it trained,
    in values and in rank."""
    load_frozen_adapter(model, folder, _KEPT)
    try:
        with AdapterSwitch(model).active(_KEPT):
            yield
    finally:
        model.delete_adapter(_KEPT)
