"""A language model of a few thousand weights, with rows of token ids and a padding collator."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from swift_cl.methods.base import TrainingRow
from tests.support.fake_context import FakeContext

VOCABULARY = 50


def tiny_lora_model(checkpointing: bool = False) -> Any:
    """A two-layer Llama with LoRA whose B is not zero, so that every LoRA tensor has a gradient."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def token_row(prompt: Sequence[int], answer: Sequence[int]) -> TrainingRow:
    """A row whose contents are token ids as text; `TokenContext` encodes it."""
    return {
        "messages": [
            {"role": "system", "content": "system"},
            {"role": "user", "content": " ".join(map(str, prompt))},
            {"role": "assistant", "content": " ".join(map(str, answer))},
        ]
    }


class TokenContext(FakeContext):
    """Encodes the rows of `token_row`; rows above `max_length` tokens are dropped as a training template does."""

    max_length = 1000

    def encode(self, rows: Sequence[TrainingRow]) -> list[dict[str, Any]]:
        encoded: list[dict[str, Any]] = []
        for row in rows:
            prompt, answer = ([int(t) for t in m["content"].split()] for m in row["messages"][-2:])
            labels = [-100] * len(prompt) + answer
            fits = len(labels) <= self.max_length
            encoded.append({"input_ids": prompt + answer, "labels": labels} if fits else {})
        return encoded

    def collate(self, encoded: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["labels"]) for row in encoded)

        def padded(key: str, filler: int) -> Tensor:
            return torch.tensor([row[key] + [filler] * (width - len(row[key])) for row in encoded])

        attended = [{"mask": [1] * len(row["labels"])} for row in encoded]
        mask = torch.tensor([row["mask"] + [0] * (width - len(row["mask"])) for row in attended])
        return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}
