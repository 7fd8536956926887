"""Base models of a real model's shape with random weights: cost does not depend on what they say.

`python -m tests.support.shapes qwen2.5-7b FOLDER` makes one (15 GB, bfloat16; on the GPU where there is one).
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from tests.support.train import MODEL

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "qwen2.5-0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
"""What the published config.json say; `tiny` is the project's own model."""


def make_shape(name: str, folder: Path) -> Path:
    """A model folder with the tiny model's tokenizer; one that is there is taken as it is."""
    if name == "tiny":
        return MODEL
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    if (folder / "config.json").is_file():
        return folder
    config = Qwen2Config(
        **SHAPES[name], max_position_embeddings=32768, rope_theta=1e6, bos_token_id=0, eos_token_id=0, dtype="bfloat16"
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    for file in MODEL.iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder / file.name)
    model.save_pretrained(folder)  # config.json comes with the weights: its presence says that they are there
    return folder


if __name__ == "__main__":
    print(make_shape(sys.argv[1], Path(sys.argv[2])))
