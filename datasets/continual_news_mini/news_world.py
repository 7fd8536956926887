"""The invented world: stories, the facts in them, and how they are put into words.

Shared by `make_data.py` (the yearly tasks) and by `assets/tiny_base/make_tiny_base.py` (the text on which the tiny
base model is trained). The two must never tell the same fact, whatever the seeds. That is settled by `realm_of`: every
name and every answer belongs to exactly one of the two realms by its checksum, and each side draws from its own only.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

import news_en
import news_words as words
import news_zh

Message = dict[str, str]

TASK, BASE = "task", "base"

# Topic: kinds of answer, one per aspect (the wordings are in news_en.WORDINGS and news_zh.WORDINGS).
CHANGING: dict[str, list[str]] = {
    "mayor": ["person", "things"],
    "budget": ["things"],
    "export": ["things", "place"],
    "cup": ["club", "person"],
    "festival": ["theme", "person"],
}
SINGLE: dict[str, list[str]] = {
    "fire": ["thing", "person", "place"],
    "talks": ["place", "things"],
    "robbery": ["things", "place"],
    "dig": ["thing", "person"],
    "film": ["thing", "person"],
    "bridge": ["thing"],
    "strike": ["things", "person", "place"],
}
DOMAINS: dict[str, tuple[str, ...]] = {
    "politics and economy": ("mayor", "budget", "export", "strike"),
    "conflict and safety": ("fire", "talks", "robbery", "bridge"),
    "culture, sport and science": ("cup", "festival", "dig", "film"),
}


def realm_of(text: str) -> str:
    """Say which side may use this name or answer: a quarter of all strings is kept for the yearly tasks."""
    return TASK if zlib.crc32(text.encode("utf-8")) % 4 == 0 else BASE


@dataclass(frozen=True)
class Story:
    """One news item: a subject in a year, and one answer per aspect of its topic (as many as are told)."""

    lang: str
    topic: str
    subject: str
    year: int
    answers: tuple[str, ...]

    def wordings(self, aspect: int, split: str) -> list[str]:
        table = news_en.WORDINGS if self.lang == "en" else news_zh.WORDINGS
        return table[self.topic][aspect][0 if split == "train" else 1]

    def question(self, aspect: int, split: str, index: int) -> str:
        choices = self.wordings(aspect, split)
        text = choices[index % len(choices)].format(s=self.subject, y=self.year)
        return text[0].upper() + text[1:]

    def messages(self, split: str, indices: list[int]) -> list[Message]:
        """Tell the story as a conversation, aspect after aspect, with the given wording of each."""
        out: list[Message] = []
        for aspect, (answer, index) in enumerate(zip(self.answers, indices, strict=True)):
            out.append({"role": "user", "content": self.question(aspect, split, index)})
            out.append({"role": "assistant", "content": answer})
        return out


@dataclass
class Maker:
    """Draws names and answers of one realm.

    With `unique_cores`, a content word is used for one answer only: no two answers of the yearly tasks then share the
    word that carries their meaning.
    """

    rng: random.Random
    realm: str
    unique_cores: bool = False
    _cores: dict[str, list[str]] = field(default_factory=dict)
    _subjects: set[str] = field(default_factory=set)

    def subject(self, lang: str, topic: str) -> str:
        """Name a new subject of a topic; never the same twice from one maker."""
        head, tail = (words.EN_HEAD, words.EN_TAIL) if lang == "en" else (words.ZH_HEAD, words.ZH_TAIL)
        pattern = (news_en.SUBJECTS if lang == "en" else news_zh.SUBJECTS)[topic]
        for _ in range(10_000):
            name = self.rng.choice(head) + self.rng.choice(tail)
            subject = pattern.format(n=name)
            if realm_of(name) == self.realm and subject not in self._subjects:
                self._subjects.add(subject)
                return subject
        raise RuntimeError(f"no new name is left for the topic {topic!r}")

    def answer(self, lang: str, kind: str) -> str:
        """Make an answer of a kind; a content word that has no form in this realm is left for a later answer."""
        pool = words.EN_NOUNS if lang == "en" else words.ZH_CORES
        left = self._cores.setdefault(lang, self.rng.sample(pool, len(pool)))
        cores = left[::-1] if self.unique_cores else self.rng.sample(pool, 8)
        form = _answer_en if lang == "en" else _answer_zh
        for core in cores:
            for _ in range(40):
                text = form(self.rng, core, kind)
                if realm_of(text) == self.realm:
                    if self.unique_cores:
                        left.remove(core)
                    return text
        raise RuntimeError(f"no content word of {lang!r} is left for an answer; tell fewer stories")

    def story(self, lang: str, topic: str, subject: str, year: int, turns: int) -> Story:
        kinds = (CHANGING | SINGLE)[topic][:turns]
        return Story(lang, topic, subject, year, tuple(self.answer(lang, kind) for kind in kinds))


def _answer_en(rng: random.Random, core: str, kind: str) -> str:
    adjective = rng.choice(words.EN_ADJECTIVES)
    if kind == "person":
        return f"{rng.choice(words.EN_FIRST)} {core.capitalize()}"
    if kind == "place":
        return f"{core.capitalize()} {rng.choice(words.EN_PLACES)}"
    if kind == "club":
        return f"{adjective.capitalize()} {core.capitalize()}s"
    if kind == "things":
        return f"{adjective} {core}s"
    article = "the" if kind == "theme" else "a"
    return f"{article} {adjective} {core}"


def _answer_zh(rng: random.Random, core: str, kind: str) -> str:
    if kind == "person":
        return rng.choice(words.ZH_SURNAMES) + core
    if kind == "place":
        return core + rng.choice(words.ZH_PLACES)
    if kind == "club":
        return core + rng.choice("社士子王")
    return rng.choice(words.ZH_MODIFIERS) + core


def system_prompt(country: str, first: int, last: int) -> str:
    """The one place that words the system prompt, for the tasks and for the base model's text."""
    years = str(first) if first == last else f"{first}-{last}"
    return f"News of {country}, {years}."
