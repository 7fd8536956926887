"""A language model of a few thousand weights, and an adapter of a first task for it."""

from pathlib import Path
from typing import Any

import torch


def language_model() -> Any:
    """A Qwen2 of two small layers, the same at every call."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    return Qwen2ForCausalLM(config)


def stage_adapter(folder: Path, **settings: Any) -> None:
    """The adapter of a finished first task, with both matrices away from zero."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(language_model(), LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(folder / "t0" / "adapter"))


def continued(folder: Path) -> Any:
    """The model of the second task: the first task's adapter, trained on."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(language_model(), str(folder / "t0" / "adapter"), is_trainable=True)
    return model.train()
