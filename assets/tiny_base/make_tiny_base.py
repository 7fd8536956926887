"""Make the tiny base model of the mini benchmark: tokenizer, weights and configuration, from generated text only.

    python assets/tiny_base/make_tiny_base.py --out build/tiny_base

The run is seeded. Weights differ in the last bits between machines and thread counts, so the committed weights are
named by their checksum in README.md.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from base_corpus import FIRST_YEAR, LAST_YEAR, base_stories, dialogues
from news_world import Message
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 3072
MAX_POSITIONS = 1024
IGNORE = -100
# How Qwen2 splits text. transformers 5 puts this in place of whatever a tokenizer.json of a `qwen2` model names, so any
# other choice would cut the text in one way here and in another way in every program that loads the model.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The ChatML form of Qwen2.5 without tools; the default system prompt is the one of the ms-swift template `qwen2_5`.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

Example = tuple[list[int], list[int]]


def train_tokenizer(talks: Iterator[list[Message]]) -> Tokenizer:
    """Train a byte-level BPE of the Qwen2 kind with few tokens a sentence.

    While merges are learned every Chinese character stands alone, so that a name reads the same in any sentence; the
    merges never cross two characters, hence the split is not needed afterwards. A year is one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    qwen2 = [
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    alone = pre_tokenizers.Split(Regex("[\u4e00-\u9fff]"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, *qwen2])
    years = [str(year) for year in range(FIRST_YEAR - 5, LAST_YEAR + 6)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(years),
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{message['role']}\n{message['content']}" for talk in talks for message in talk)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(qwen2)
    tokenizer.add_tokens([AddedToken(year, normalized=False) for year in years])
    return tokenizer


def encode(tokenizer: Tokenizer, talk: list[Message]) -> Example:
    """Render a dialogue as ChatML; only what the assistant says is learned."""
    ids: list[int] = []
    labels: list[int] = []
    for message in talk:
        head = tokenizer.encode(f"{IM_START}{message['role']}\n").ids
        body = tokenizer.encode(message["content"] + IM_END).ids
        tail = tokenizer.encode("\n").ids
        learned = message["role"] == "assistant"
        ids += head + body + tail
        labels += [IGNORE] * len(head) + (body if learned else [IGNORE] * len(body)) + [IGNORE] * len(tail)
    return ids, labels


def batches(examples: Iterator[Example], size: int) -> Iterator[list[Example]]:
    """Group dialogues of similar length, to waste little on padding."""
    while True:
        pool = sorted(itertools.islice(examples, size * 16), key=lambda example: len(example[0]))
        groups = [pool[i : i + size] for i in range(0, len(pool), size)]
        random.shuffle(groups)
        yield from groups


def collate(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right; causal attention makes a mask needless there."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in batch])
    return ids, labels


def loss_of(model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy; the output layer runs on the learned positions only, which are a fifth of all."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    learned = targets != IGNORE
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]).float(), targets[learned])


def new_model(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,  # a head of 64, the smallest that vLLM serves on a CPU
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return Qwen2ForCausalLM(config)


def train(
    model: Qwen2ForCausalLM,
    examples: Iterator[Example],
    steps: int,
    batch_size: int,
    peak: float,
    keep: Callable[[], None],
) -> None:
    """Train with a cosine schedule; `keep` is called now and then, so that a stopped run leaves a model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warm = max(1, steps // 30)

    def shape(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    model.train()
    mean = 0.0
    bar = tqdm(itertools.islice(batches(examples, batch_size), steps), total=steps, mininterval=10)
    for step, batch in enumerate(bar):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, *collate(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if step % 250 == 249:
            keep()


def save(model: Qwen2ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the layout that transformers, ms-swift and vLLM read."""
    out.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=0, eos_token_id=2, do_sample=False)
    model.save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START, IM_END],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of text and weights (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write (default: this one)")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="dialogues a step (default: %(default)s)")
    parser.add_argument("--subjects", type=int, default=300, help="subjects of the base text (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    random.seed(args.seed)
    stories = base_stories(args.seed, args.subjects)
    tokenizer = train_tokenizer(itertools.islice(dialogues(stories, args.seed + 1), 30_000))
    model = new_model(args.seed)
    size = {"parameters": model.num_parameters(), "stories": len(stories), "vocabulary": tokenizer.get_vocab_size()}
    print(json.dumps(size), flush=True)
    started = time.monotonic()
    examples = (encode(tokenizer, talk) for talk in dialogues(stories, args.seed + 2))
    train(model, examples, args.steps, args.batch_size, args.lr, lambda: save(model, tokenizer, args.out))
    save(model, tokenizer, args.out)
    print(f"trained {args.steps} steps in {time.monotonic() - started:.0f} s, wrote {args.out}")


if __name__ == "__main__":
    main()
