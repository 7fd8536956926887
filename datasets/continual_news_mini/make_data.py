"""Write the mini Continual-News benchmark: four yearly tasks of an invented country, in English and Chinese.

The default arguments reproduce the committed files byte for byte; another seed makes another world of the same shape.

    python datasets/continual_news_mini/make_data.py --out build/news
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from news_world import CHANGING, SINGLE, TASK, Maker, Story, system_prompt

COUNTRY = "Velmora"
YEARS = (2022, 2023, 2024, 2025)
TRAIN_WORDINGS = 4
# Stories per topic and language in a year. English has a few more, as in the benchmark this one imitates.
EXTRA_ENGLISH = ("mayor", "dig")
NO_CHINESE = ("talks", "bridge")

Row = dict[str, Any]


def plan(rng: random.Random) -> list[tuple[str, str, int]]:
    """List (language, topic, number of turns) of a year's stories; every year has the same plan."""
    items: list[tuple[str, str, int]] = []
    for topic, kinds in (CHANGING | SINGLE).items():
        for lang in ["en"] * (2 if topic in EXTRA_ENGLISH else 1) + ["zh"] * (topic not in NO_CHINESE):
            turns = len(kinds) - 1 if len(kinds) > 1 and rng.random() < 0.3 else len(kinds)
            items.append((lang, topic, turns))
    return items


def build_world(seed: int) -> dict[int, list[Story]]:
    """Invent all stories. A changing topic keeps its subject through the years, the others get a new one each year."""
    rng = random.Random(seed)
    maker = Maker(rng, TASK, unique_cores=True)
    items = plan(rng)
    lasting = [maker.subject(lang, topic) if topic in CHANGING else None for lang, topic, _ in items]
    world: dict[int, list[Story]] = {}
    for year in YEARS:
        world[year] = [
            maker.story(lang, topic, subject or maker.subject(lang, topic), year, turns)
            for (lang, topic, turns), subject in zip(items, lasting, strict=True)
        ]
    return world


def make_rows(stories: Sequence[Story], split: str, rng: random.Random) -> list[Row]:
    """Word the stories: every train wording of a story once, one test wording of it."""
    talks = []
    for story in stories:
        if split == "train":
            talks += [story.messages(split, [i] * len(story.answers)) for i in range(TRAIN_WORDINGS)]
        else:
            talks.append(story.messages(split, [rng.randrange(2) for _ in story.answers]))
    rng.shuffle(talks)
    year = stories[0].year
    return [{"id": f"{year}-{split}-{i:04d}", "messages": talk} for i, talk in enumerate(talks, start=1)]


def benchmark_yaml() -> str:
    names = [str(year) for year in YEARS]
    lines = ["name: continual_news_mini", "format: messages", "tasks:"]
    for year in YEARS:
        lines += [
            f'  - name: "{year}"',
            f"    train: {year}-train.json",
            f"    test: test_data/{year}-test.json",
            f'    system: "{system_prompt(COUNTRY, YEARS[0], year)}"',
        ]
    lines += ["orders:", f"  default: {json.dumps(names)}", f"  reverse: {json.dumps(names[::-1])}"]
    lines += ["scorers: [similarity, exact_match]", "generation: {max_tokens: 24}"]
    return "\n".join(lines) + "\n"


def write(out: Path, seed: int) -> None:
    (out / "test_data").mkdir(parents=True, exist_ok=True)
    world = build_world(seed)
    rng = random.Random(seed + 1)
    for year, stories in world.items():
        for split, path in (("train", f"{year}-train.json"), ("test", f"test_data/{year}-test.json")):
            text = json.dumps(make_rows(stories, split, rng), ensure_ascii=False, indent=1)
            (out / path).write_text(text + "\n", encoding="utf-8", newline="\n")
    (out / "benchmark.yaml").write_text(benchmark_yaml(), encoding="utf-8", newline="\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the invented world (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write (default: this one)")
    args = parser.parse_args(argv)
    write(args.out, args.seed)
    print(f"wrote {len(YEARS)} yearly tasks and benchmark.yaml to {args.out}")


if __name__ == "__main__":
    main()
