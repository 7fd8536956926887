"""A base model that continues lists of `Input:` and `Output:`, which the bundled tiny one does not.

Its weights are in tests/data/talking_base (0.6 MB, bf16), made by `python -m tests.support.talking_base`; its tokenizer
is that of the tiny model.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.support.synthesised import DEFINITION
from tests.support.train import MODEL

WEIGHTS = ROOT / "tests" / "data" / "talking_base"
THINGS = [f"{colour} {thing}" for colour in ("red", "old", "big", "new") for thing in ("cat", "boat", "road", "song")]


def things(kind: str) -> list[dict[str, Any]]:
    """Rows in SSR's format whose answer is a word and the question's first word."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{DEFINITION}\n\n{thing}"},
                {"role": "assistant", "content": f"{kind} {thing.split()[0]}"},
            ]
        }
        for thing in THINGS
    ]


def write_things(path: Path, kind: str) -> Path:
    """A data file of these rows."""
    path.write_text(json.dumps(things(kind)), encoding="utf-8")
    return path


def turn(question: str, answer: str) -> str:
    """A question and its answer in the tiny model's template."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"


def talking_base(folder: Path) -> Path:
    """The model in a folder of its own, with the tiny one's tokenizer."""
    shutil.copytree(WEIGHTS, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


def make_weights(steps: int = 250) -> None:
    """Train a model of two narrow layers, with the tiny one's tokenizer, on lists of things, on questions, and on the
    generation rows of a task `first`."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    generator = random.Random(0)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = Qwen2Config.from_pretrained(
        MODEL, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["full_attention"] * 2, dtype="float32",
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        texts = []
        for _ in range(4):
            drawn = generator.sample(THINGS, 4)
            shown = "".join(f"Input: {thing}\nOutput: a {thing.split()[0]}\n\n" for thing in drawn)
            texts.append(f"{DEFINITION}\n\n{shown}")
            question, answer = f"{DEFINITION}\n\n{drawn[0]}", f"a {drawn[0].split()[0]}"
            texts.append(turn(question, answer))
            texts.append(turn("__gen__:first", f"{question}\n__ans__\n{answer}"))
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(WEIGHTS)
    (WEIGHTS / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    make_weights()
