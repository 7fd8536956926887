"""A vision-language model of LLaVA's shape, small enough to learn colours on a CPU in seconds, and pictures to show it.

LLaVA, because ms-swift's Qwen2-VL needs torchvision, whose published wheels do not load beside a CPU build of torch.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.train import MODEL

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200), "white": (230, 230, 230)}
FLAGS = {"model_type": "llava1_5_hf", "template": "llava1_5_hf", "torch_dtype": "float32"}
IMAGE, BEGIN, END = "<image>", "<s>", "</s>"
SIDE, PATCH = 28, 14


def seeing_base(folder: Path) -> Path:
    """The untrained model with its processor, the same weights at every call."""
    import torch
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2Config,
    )

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, BEGIN], "eos_token": END})
    tokenizer.chat_template = None
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.convert_tokens_to_ids(BEGIN), pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=4,
        )
    )
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_resize=True, do_center_crop=True
    )
    LlavaProcessor(
        processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    return folder


def write_pictures(folder: Path, name: str, question: str, shades: Sequence[int]) -> Path:
    """A data file that asks the same question about a picture of every colour, in several shades."""
    from PIL import Image

    rows: list[dict[str, Any]] = []
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for shade in shades:
        for colour, rgb in COLOURS.items():
            file = f"pictures/{name}-{colour}-{shade}.png"
            Image.new("RGB", (SIDE, SIDE), tuple(min(255, value + shade) for value in rgb)).save(folder / file)
            said = colour if question == "colour" else f"{question} {colour}"
            messages = [{"role": "user", "content": f"<image>{question}?"}, {"role": "assistant", "content": said}]
            rows.append({"id": f"{colour}-{shade}", "messages": messages, "images": [str(folder / file)]})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
