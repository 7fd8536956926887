"""A base model that continues lists: the small one of the shared bench, tuned on examples of tasks that no part asks.

    python -m tests.benchmarks.results.warm_base --out build/results/warm_base

SSR and pseudo replay have the base model continue a list of examples. Large models can; the bench's 17 M parameters do
so in 2 of 100 attempts. For the part that compares them it is first tuned, in full, on lists and conversations of
SuperNI, ABSACL_ATSC and Concept-1K (never of CL_Benchmark, which that part then asks), and every method of the part
starts from the result.
"""

import argparse
import random
import sys
from collections.abc import Iterator

from tests.benchmarks.results.parts import BENCH, ROOT, SHARED, absa_tasks, superni_tasks

SEED, STEPS, BATCH, LONGEST = 0, 300, 4, 448
"""Steps, documents a step and tokens of a document."""
LISTS = 0.65
"""Share of the documents that are lists; the others are conversations, so that those are not unlearned."""


def examples() -> list[tuple[str, list[tuple[str, str]]]]:
    """(definition, its (input, output) pairs) of every task that is listed."""
    from swift_cl.methods._synthesis import common_frame
    from swift_cl.stream.readers import read_rows

    sources = [(source.train[0], source.train[1], source.train[2]) for source in (*superni_tasks(), *absa_tasks(None))]
    concepts = SHARED / "bench/data/concept_1k/dataset.txt"
    sources += [(concepts, "concept_1k", {"task": group, "tasks": 5}) for group in range(5)]
    found: dict[str, list[tuple[str, str]]] = {}
    for file, file_format, options in sources:
        pairs = [
            (row.messages[-2]["content"], row.messages[-1]["content"])
            for row in read_rows(file, file_format, None, options)
        ]
        definition, separator, ending = common_frame([x for x, _ in pairs])
        opening = len(definition + separator) if definition else 0
        cut = [(x[opening : len(x) - len(ending)].strip(), y.strip()) for x, y in pairs]
        found.setdefault(definition, []).extend(cut)
    return list(found.items())


def documents(tokenizer) -> Iterator[list[int]]:  # type: ignore[no-untyped-def]
    """Token numbers of one document after another, without end."""
    draw, tasks = random.Random(SEED), examples()
    while True:
        definition, pairs = draw.choice(tasks)
        draw.shuffle(pairs)
        is_list, ids = draw.random() < LISTS, []
        if is_list and definition:
            ids = tokenizer(definition + "\n\n")["input_ids"]
        for x, y in pairs:
            if is_list:
                text = f"Input: {x}\nOutput: {y}\n\n"
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
