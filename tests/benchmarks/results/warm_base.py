"""A base model that continues lists of examples: the small one of the shared bench, tuned on such lists.

    python -m tests.benchmarks.results.warm_base --out build/results/warm_base

SSR and pseudo replay have the base model continue a list of examples. Large models can; of the bench's 17 M parameters
some 2 of 100 continuations are one. For the part that compares those methods it is first tuned in full, and every
method of the part starts from the result. What it sees: lists and conversations of SuperNI, ABSACL_ATSC and Concept-1K;
and lists of CL_Benchmark's questions with answers drawn at random, so that it learns how such a list goes on and
nothing of what that part then trains and asks. These are rows that the part uses nowhere else.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.results.parts import BENCH, ROOT, SHARED, absa_tasks, cl_benchmark_tasks, superni_tasks

SEED, STEPS, BATCH, LONGEST = 0, 300, 4, 448
"""Steps, documents a step and tokens of a document."""
LISTS = 0.65
"""Share of the others' documents that are lists; the rest are conversations, so that those are not unlearned."""
UNUSED_FROM = 1000
"""Of CL_Benchmark's training files (2,000 rows) the part trains the first tens of rows."""


Pairs = list[tuple[str, str]]


def examples() -> tuple[dict[str, Pairs], dict[str, Pairs]]:
    """Definition -> (input, output) pairs: of the tasks that are only listed here, and of those that the part asks."""
    from swift_cl.methods._synthesis import common_frame
    from swift_cl.stream.readers import read_rows

    concepts = SHARED / "bench/data/concept_1k/dataset.txt"
    others = [source.train for source in (*superni_tasks(), *absa_tasks(None))]
    others += [(concepts, "concept_1k", {"task": group, "tasks": 5}) for group in range(5)]
    asked = [source.train for source in cl_benchmark_tasks()]

    def collect(sources: list[tuple[Path, str, dict[str, Any]]], first: int) -> dict[str, Pairs]:
        found: dict[str, Pairs] = {}
        for file, file_format, options in sources:
            rows = read_rows(file, file_format, None, options)[first:]
            pairs = [(row.messages[-2]["content"], row.messages[-1]["content"]) for row in rows]
            definition, separator, ending = common_frame([x for x, _ in pairs])
            opening = len(definition + separator) if definition else 0
            cut = [(x[opening : len(x) - len(ending)].strip(), y.strip()) for x, y in pairs]
            found.setdefault(definition, []).extend(cut)
        return found

    return collect(others, 0), collect(asked, UNUSED_FROM)


def documents(tokenizer: Any) -> Iterator[list[int]]:
    """Token numbers of one document after another, without end."""
    draw, (others, asked) = random.Random(SEED), examples()
    answers = {definition: [y for _, y in pairs] for definition, pairs in asked.items()}
    while True:
        definition = draw.choice([*others, *asked])
        pairs = others[definition] if definition in others else asked[definition]
        draw.shuffle(pairs)
        is_list, ids = definition in asked or draw.random() < LISTS, []
        if is_list and definition:
            ids = tokenizer(definition + "\n\n")["input_ids"]
        for x, y in pairs:
            if is_list:
                text = f"Input: {x}\nOutput: {draw.choice(answers[definition]) if definition in asked else y}\n\n"
            else:
                user = f"{definition}\n\n{x}" if definition else x
                turns = [{"role": "user", "content": user}, {"role": "assistant", "content": y}]
                text = tokenizer.apply_chat_template(turns, tokenize=False)
            ids += tokenizer(text)["input_ids"]
            if len(ids) >= LONGEST:
                break
        yield ids[:LONGEST]


def main() -> int:
    """Tune and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the tuned model")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, default=5e-4)
    args = parser.parse_args()
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    base = (ROOT / BENCH).resolve()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stream = documents(tokenizer)
    rows = [{"input_ids": next(stream)} for _ in range(args.steps * BATCH)]
    settings = TrainingArguments(
        args.out, max_steps=args.steps, per_device_train_batch_size=BATCH, learning_rate=args.rate, use_cpu=True,
        seed=SEED, lr_scheduler_type="cosine", warmup_steps=30, logging_steps=25, save_strategy="no", report_to=[],
        weight_decay=0.01, max_grad_norm=1.0,
    )  # fmt: skip
    Trainer(
        model, settings, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)
    ).train()  # type: ignore[no-untyped-call]
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
