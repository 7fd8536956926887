"""A T5 small enough to learn words by heart on a CPU in seconds, with random weights and a tokenizer of its own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FLAGS = {"model_type": "t5", "template": "t5", "torch_dtype": "float32"}
PAIRS = {
    "capital": {"france": "paris", "spain": "madrid", "south korea": "seoul", "new zealand": "the city of wellington"},
    "colour": {"grass": "green", "snow": "white", "blood": "dark red", "the sky by day": "blue"},
}
"""Task -> question word -> answer: what can be learned by heart only."""


def rows(task: str) -> list[dict[str, Any]]:
    """A task's questions and answers in the messages format."""
    found = []
    for word, answer in PAIRS[task].items():
        said = [{"role": "user", "content": f"{task} of {word}"}, {"role": "assistant", "content": answer}]
        found.append({"id": word, "messages": said})
    return found


def write_rows(folder: Path, task: str) -> Path:
    """A data file of them, `<task>.json`."""
    path = folder / f"{task}.json"
    path.write_text(json.dumps(rows(task)), encoding="utf-8")
    return path


def _texts() -> list[str]:
    return [message["content"] for task in PAIRS for row in rows(task) for message in row["messages"]]


def tokenizer(texts: Sequence[str]) -> Any:
    """As T5's: unigram pieces, `<pad>` 0 and `</s>` 1, `</s>` after every text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from tokenizers.decoders import Metaspace
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    words = sorted({f"▁{word}" for text in texts for word in text.split()})
    letters = sorted({"▁", *"".join(words)})
    pieces = [(piece, 0.0) for piece in special] + [(piece, -2.0) for piece in words] + [(p, -9.0) for p in letters]
    own = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=2))
    own.normalizer = normalizers.Sequence([normalizers.Replace("\n", " "), normalizers.Strip()])
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    own.decoder = Metaspace()
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_t5(folder: Path, kind: str = "T5") -> Path:
    """The untrained model, the same weights at every call.

    Args:
        kind: `T5` or `MT5`.
    """
    import torch
    import transformers

    words = tokenizer(_texts())
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, initializer_factor=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
