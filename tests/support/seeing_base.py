"""Vision-language models small enough to learn colours on a CPU in seconds, and pictures to show them.

LLaVA everywhere; Qwen2-VL where torchvision loads, which ms-swift's code for it needs (its published wheels do not load
beside a CPU build of torch).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.train import MODEL

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200), "white": (230, 230, 230)}
IMAGE, BEGIN, END = "<image>", "<s>", "</s>"
SIDE, PATCH = 28, 14


def llava(folder: Path) -> Path:
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


QWEN_TOKENS = {
    "<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}  # fmt: skip
"""ms-swift knows Qwen2-VL's by number."""


def qwen2_vl(folder: Path) -> Path:
    """The untrained model with its processor, the same weights at every call."""
    import torch
    from tokenizers import Tokenizer
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    words = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    words["model"]["vocab"].update(QWEN_TOKENS)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words["added_tokens"] = [entry for entry in words["added_tokens"] if entry["special"]]
    words["added_tokens"] += [{"id": number, "content": text, **plain} for text, number in QWEN_TOKENS.items()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(words)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    text = {
        "vocab_size": max(QWEN_TOKENS.values()) + 1, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.1, "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )
    model.save_pretrained(folder)
    Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor()).save_pretrained(folder)
    return folder


def why_not_qwen2_vl() -> str | None:
    """What keeps ms-swift's Qwen2-VL from running here; None where it can."""
    for library in ("torchvision", "qwen_vl_utils"):
        try:
            __import__(library)
        except Exception as error:  # torchvision fails in many ways beside another build of torch
            return f"{library} does not load: {error}"
    return None


@dataclass(frozen=True)
class Shape:
    """One of the models: what makes it in a folder, and the flags that name it."""

    make: Callable[[Path], Path]
    flags: dict[str, Any]


def _flags(name: str) -> dict[str, Any]:
    return {"model_type": name, "template": name, "torch_dtype": "float32"}


SHAPES = {"llava": Shape(llava, _flags("llava1_5_hf")), "qwen2_vl": Shape(qwen2_vl, _flags("qwen2_vl"))}


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
