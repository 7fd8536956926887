"""Text for the tiny base model: news of other invented countries, told many times in many wordings.

The base model has to bring what a real base model brings: it knows the language of the questions in all their
wordings, the form of the answers, follow-up questions, and that a subject can have another answer every year. It must
not know one fact of the yearly tasks: names and answers are drawn from the other realm (see `news_world.realm_of`).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "datasets" / "continual_news_mini"))

from news_world import BASE, CHANGING, SINGLE, Maker, Message, Story, system_prompt

COUNTRIES = ("Kelland", "Tarsia", "Quorran", "Ferrowil", "Zandria", "Lunor", "Pelagia", "Ostavia")
FIRST_YEAR, LAST_YEAR = 2010, 2030
CHANGING_YEARS = 4
CHINESE_SHARE = 0.42
FIRST_STORIES, GROWTH = 96, 1.04
CONTEXT_SHARE = 0.05
SMALL_TALK_SHARE = 0.02

SMALL_TALK = (
    ("Hello!", "Hello, what would you like to know?"),
    ("Who are you?", "A tiny model for continual learning."),
    ("Thank you.", "You are welcome."),
    ("Good morning.", "Good morning!"),
    ("你好！", "你好，你想知道什么？"),
    ("你是谁？", "我是一个很小的语言模型。"),
    ("谢谢。", "不客气。"),
    ("早上好。", "早上好！"),
)


@dataclass(frozen=True)
class BaseStory:
    """A story and the country whose news it belongs to."""

    story: Story
    country: str


def base_stories(seed: int, subjects: int) -> list[BaseStory]:
    """Invent `subjects` subjects with one story each, or one story a year for the topics that change."""
    rng = random.Random(seed)
    maker = Maker(rng, BASE)
    topics = CHANGING | SINGLE
    out = []
    for number in range(subjects):
        lang = "zh" if rng.random() < CHINESE_SHARE else "en"
        topic = list(topics)[number % len(topics)]
        country = rng.choice(COUNTRIES)
        subject = maker.subject(lang, topic)
        turns = rng.randint(max(1, len(topics[topic]) - 1), len(topics[topic]))
        years = rng.sample(range(FIRST_YEAR, LAST_YEAR + 1), CHANGING_YEARS if topic in CHANGING else 1)
        out += [BaseStory(maker.story(lang, topic, subject, year, turns), country) for year in sorted(years)]
    return out


def _wordings(story: Story, rng: random.Random) -> list[Message]:
    """Tell a story with any wording of each aspect, sometimes without its last follow-ups."""
    messages: list[Message] = []
    for aspect, answer in enumerate(story.answers):
        split = "train" if rng.random() < 0.6 else "test"
        question = story.question(aspect, split, rng.randrange(12))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _system(item: BaseStory, rng: random.Random) -> Message:
    first = item.story.year - rng.choice((0, 0, 1, 2, 3))
    last = item.story.year + rng.choice((0, 0, 1, 2, 3))
    return {"role": "system", "content": system_prompt(item.country, first, last)}


def _context(item: BaseStory, others: list[BaseStory], rng: random.Random) -> list[Message]:
    """Ask about something told just before: a fresh answer, so that it has to be read and cannot be remembered."""
    maker = Maker(rng, BASE)
    told = rng.sample([item, *others], len(others) + 1)
    lines, wanted = [], ""
    for one in told:
        fresh = maker.story(one.story.lang, one.story.topic, one.story.subject, one.story.year, 1)
        lines += [fresh.question(0, rng.choice(("train", "test")), rng.randrange(12)) + " " + fresh.answers[0]]
        if one is item:
            wanted = fresh.answers[0]
    question = item.story.question(0, rng.choice(("train", "test")), rng.randrange(12))
    return [{"role": "user", "content": "\n".join([*lines, question])}, {"role": "assistant", "content": wanted}]


def dialogues(stories: list[BaseStory], seed: int) -> Iterator[list[Message]]:
    """Yield dialogues without end, in rounds; in a round every story told so far comes once, in new wordings.

    The first rounds tell `FIRST_STORIES` stories, and each later one tells `GROWTH` times as many as the one before.
    A model that meets all stories from the start stays for thousands of steps on the plateau where it knows the form
    of the answers and no fact; with few stories it learns at once to recall by subject and year, and keeps to it.
    """
    rng = random.Random(seed)
    told = float(FIRST_STORIES)
    while True:
        known = stories[: int(told)]
        for item in rng.sample(known, len(known)):
            draw = rng.random()
            if draw < SMALL_TALK_SHARE:
                question, answer = rng.choice(SMALL_TALK)
                yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            if draw > 1 - CONTEXT_SHARE:
                others = [one for one in rng.sample(known, 2) if one is not item]
                yield [_system(item, rng), *_context(item, others, rng)]
            yield [_system(item, rng), *_wordings(item.story, rng)]
        told = min(told * GROWTH, float(len(stories)))
