"""Routing without ms-swift: the small language model with adapters of several tasks, and a template of characters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swift_cl.methods._routing import Candidate
from swift_cl.methods.base import Method
from swift_cl.serving.routing.model import RouteModel, StageRouter
from tests.support.tiny_lora import language_model

BEFORE, AFTER = [1, 2], [3, 4]


class CharacterTemplate:
    """`[1, 2] + system + question + [3, 4]`, a token a character."""

    def encode(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        texts = [message["content"] for message in row["messages"]]
        return {"input_ids": [*BEFORE, *(5 + ord(c) % 50 for c in "".join(texts)), *AFTER]}


def make_adapters(folder: Path, names: Sequence[str]) -> list[Candidate]:
    """One adapter a task, each of other numbers."""
    import torch
    from peft import LoraConfig, get_peft_model

    for number, name in enumerate(names):
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(language_model(), config)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        model.save_pretrained(str(folder / name))
    return [Candidate(name, (name,), folder / name) for name in names]


def make_router(method: Method, candidates: Sequence[Candidate], stage_dir: Path = Path("missing")) -> StageRouter:
    """The router of a stage that has learned these tasks, on a model of its own."""
    model = RouteModel(lambda: (language_model().eval(), CharacterTemplate()))
    return StageRouter(method, stage_dir, [c.name for c in candidates], list(candidates), model)
