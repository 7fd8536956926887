"""Where a new prompt starts: at embeddings of tokens, drawn or of a text."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor

from swift_cl.errors import UserError
from swift_cl.tuners.soft_prompt.model import layer_of, prompt_of


def start_at(model: Any, init: str, text: str, seed: int) -> None:
    """Set the trained prompt to embeddings of random tokens (`vocab`) or of a text's (`text`)."""
    length, embeddings = len(prompt_of(model).embedding), layer_of(model).base_layer.get_input_embeddings()
    if init == "text":
        ids = tokens_of(model, text)
        if not ids:
            raise UserError(f"the text in which the prompt is to start has no token: {text!r}")
        set_tokens(model, (ids * length)[:length])
    else:
        drawn = torch.randint(embeddings.num_embeddings, (length,), generator=torch.Generator().manual_seed(seed))
        set_tokens(model, drawn.tolist())


def tokens_of(model: Any, text: str) -> list[int]:
    """Tokens of a plain text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.model_dir)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def set_tokens(model: Any, ids: Sequence[int]) -> None:
    """Set the trained prompt to the embeddings of these tokens, one a row."""
    weight = layer_of(model).base_layer.get_input_embeddings().weight
    with torch.no_grad(), gather_params_ctx([weight]):
        rows: Tensor = weight[torch.tensor(ids, device=weight.device)].float()
    set_rows(model, rows)


def set_rows(model: Any, rows: Tensor) -> None:
    """Set the trained prompt, [n, width]."""
    prompt = prompt_of(model)
    with torch.no_grad():
        prompt.embedding.copy_(rows)
