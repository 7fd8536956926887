"""BLEU (sacrebleu): a cell is the corpus BLEU of its answers; a single answer shows its sentence BLEU.

Corpus BLEU is not the mean of sentence BLEUs: n-gram counts are summed over the answers first, as papers report it.
Sentence BLEU (effective order: no n-gram longer than the answer counts) is for looking at answers one by one.
`tokenize` is sacrebleu's tokeniser; `auto` takes `zh` where the task's references hold Chinese or kana, else `13a`.
results.json keeps sacrebleu's signature.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from swift_cl.evaluation.scorers import Item
from swift_cl.evaluation.scorers._library import require
from swift_cl.evaluation.scorers._options import ScorerOptions
from swift_cl.evaluation.scorers._text import has_unspaced

HIGHER_IS_BETTER = True
RANGE = (0.0, 100.0)
NEEDS = "extra scorers (sacrebleu)"
CELL = "corpus BLEU of the cell's answers"


class Options(ScorerOptions):
    """Settings of a task."""

    tokenize: Literal["auto", "13a", "zh", "intl", "char", "none"] = "auto"
    lowercase: bool = False


class Bleu:
    """Sentence BLEU for answers, corpus BLEU for cells."""

    def __init__(self, options: Options) -> None:
        self.options = options

    @cached_property
    def _made(self) -> dict[tuple[str, bool], Any]:
        return {}

    def _metric(self, tokenize: str, sentence: bool) -> Any:
        from sacrebleu.metrics import BLEU

        if (tokenize, sentence) not in self._made:
            lowercase = self.options.lowercase
            # force: silences a warning about answers that end in " ."; it changes no number.
            made = BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=sentence, force=True)
            self._made[tokenize, sentence] = made
        return self._made[tokenize, sentence]

    def tokenizer(self, items: Sequence[Item]) -> str:
        """The tokeniser for the items of one task."""
        if self.options.tokenize != "auto":
            return self.options.tokenize
        return "zh" if any(has_unspaced(item.reference) for item in items) else "13a"

    def score_items(self, items: Sequence[Item]) -> list[float]:
        """Sentence BLEU of each item."""
        chosen = {t: self.tokenizer([item for item in items if item.task == t]) for t in {i.task for i in items}}
        metrics = {task: self._metric(tokenize, sentence=True) for task, tokenize in chosen.items()}
        scores = [metrics[item.task].sentence_score(item.answer, [item.reference]).score for item in items]
        return [min(100.0, float(score)) for score in scores]

    def cell(self, items: Sequence[Item], scores: Sequence[float]) -> float:
        """Corpus BLEU."""
        metric = self._metric(self.tokenizer(items), sentence=False)
        found = metric.corpus_score([item.answer for item in items], [[item.reference for item in items]])
        return min(100.0, float(found.score))

    def facts(self, items: Sequence[Item]) -> dict[str, Any]:
        """sacrebleu's signature by tokeniser, with the tasks it was used for."""
        tasks: dict[str, list[str]] = {}
        for task in dict.fromkeys(item.task for item in items):
            tokenize = self.tokenizer([item for item in items if item.task == task])
            metric = self._metric(tokenize, sentence=False)
            name = metric.corpus_score(["a"], [["a"]]).name  # the signature is complete only after a call
            tasks.setdefault(f"{name}|{metric.get_signature()}", []).append(task)
        return {"signatures": tasks}


def load(model: str | None = None, options: Options | None = None) -> Bleu:
    """Check that the library is there."""
    require("bleu", "sacrebleu")
    return Bleu(options or Options())
