"""SSR's synthesis against ms-swift's engine alone: tokens per second for the same candidates, in one run.

    python -m tests.benchmarks.generation_speed [--candidates 1140] [--batch 64] [--rounds 2] [--model DIR] [--check]

Both sides load nothing and continue the same prompts with the same engine: alone, its `infer` gets them in the order in
which they come, `--batch` at a time; the synthesis makes the prompts, sorts, draws, reads, screens and writes all that
a stage writes. Sides take turns; each counts with its fastest turn. The ratio is the synthesis's tokens per second
over the engine's; the bound of the design is 0.8; with --check the exit code is 1 below it.

The default model is the small one of the tests that continues lists of examples; with another one, look at the number
of tokens a candidate has: a model that ends at once measures nothing but the overhead.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("LOG_LEVEL", "ERROR")
BOUND = 0.8


def open_stage(model: str, folder: Path) -> Any:
    """A stage with its model loaded, as it is when rows are generated."""
    from swift_cl.training.sft import CLSft
    from tests.support.train import TASKS, stage_argv

    return CLSft(stage_argv("seq", TASKS[0], folder / "stage", None, model=model))


def rows_of_things() -> list[dict[str, Any]]:
    """Sixteen rows, as a method sees them."""
    from tests.support.talking_base import things

    system = {"role": "system", "content": ""}
    return [{"messages": [system, *row["messages"]]} for row in things("a")]


def measure(args: argparse.Namespace, folder: Path) -> tuple[list[float], list[float]]:
    """Tokens per second of (the engine alone, the synthesis), one value a turn."""
    from fractions import Fraction

    from swift.infer_engine import InferRequest

    from swift_cl.generation.engine import Sampling
    from swift_cl.generation.protocol import Rules, exactly
    from swift_cl.generation.swift_engine import _config
    from swift_cl.io import read_jsonl
    from swift_cl.methods._synthesis import STOP, TaskFacts
    from tests.support.talking_base import talking_base

    sft = open_stage(args.model or str(talking_base(folder / "base")), folder)
    facts = TaskFacts.of("kinds", [row for _ in range(125) for row in rows_of_things()], "ssr", 0.01, 2, 0)
    sampling = Sampling(0.9, args.tokens, top_p=0.6, repetition_penalty=1.2, stop=(STOP,))
    alone: list[float] = []
    whole: list[float] = []
    with sft._open_engine(None, "transformers") as engine:
        swift: Any = engine.engine

        def bare(texts: list[str]) -> float:
            swift.template = engine._plain
            begin, tokens = time.perf_counter(), 0
            for start in range(0, len(texts), args.batch):
                requests = [
                    InferRequest(messages=[{"role": "user", "content": t}]) for t in texts[start : start + args.batch]
                ]
                replies = swift.infer(requests, _config(sampling), use_tqdm=False)
                tokens += sum(len(reply.choices[0].token_ids) for reply in replies)
            return tokens / (time.perf_counter() - begin)

        def synthesis(turn: int) -> tuple[float, list[str]]:
            order = facts.order(sft.session, engine, args.candidates, 2, None, turn)
            texts = [order.prompt(i).text or "" for i in range(args.candidates)]
            rules = Rules("ssr", "next", turn, args.batch, 1, Fraction(0), Fraction(1), keep_all=True)
            begin = time.perf_counter()
            exactly(engine, [order], sampling, rules, folder / f"turn{turn}", lambda line: None)
            seconds = time.perf_counter() - begin
            (answers,) = (folder / f"turn{turn}" / "rounds").glob("*.jsonl")
            tokens = sum(row["tokens"] for row in read_jsonl(answers))
            print(f"turn {turn}: {tokens / args.candidates:.1f} tokens a candidate")
            return tokens / seconds, texts

        bare([facts.order(sft.session, engine, 1, 2, None).prompt(0).text or ""] * args.batch)
        for turn in range(args.rounds):
            speed, texts = synthesis(turn)
            whole.append(speed)
            alone.append(bare(texts))
    return alone, whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1140)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a candidate")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--model", default="", help="another base model; a folder")
    parser.add_argument("--check", action="store_true", help=f"exit code 1 if the ratio is below {BOUND}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone, whole = measure(args, Path(folder))
    ratio = max(whole) / max(alone)
    print(f"{args.candidates} candidates of up to {args.tokens} tokens, batches of {args.batch}")
    print(f"engine alone {max(alone):9.1f} tokens/s   turns: {', '.join(f'{v:.1f}' for v in alone)}")
    print(f"synthesis    {max(whole):9.1f} tokens/s   turns: {', '.join(f'{v:.1f}' for v in whole)}")
    print(f"ratio {ratio:.3f}, bound {BOUND}")
    return int(args.check and ratio < BOUND)


if __name__ == "__main__":
    sys.exit(main())
