"""chrF (sacrebleu): a cell is the corpus chrF of its answers; a single answer shows its sentence chrF.

Character n-grams up to 6, beta 2; with `word_order: 2` it is chrF++. It needs no words, so it suits Chinese as it is.
Corpus chrF sums n-gram counts over the answers first. results.json keeps sacrebleu's signature.
"""

from collections.abc import Sequence
from typing import Any, Literal

from swift_cl.evaluation.scorers import Item
from swift_cl.evaluation.scorers._library import require
from swift_cl.evaluation.scorers._options import ScorerOptions

HIGHER_IS_BETTER = True
RANGE = (0.0, 100.0)
NEEDS = "extra scorers (sacrebleu)"
CELL = "corpus chrF of the cell's answers"


class Options(ScorerOptions):
    """Settings of a task."""

    word_order: Literal[0, 2] = 0
    lowercase: bool = False


class Chrf:
    """Sentence chrF for answers, corpus chrF for cells."""

    def __init__(self, options: Options) -> None:
        from sacrebleu.metrics import CHRF

        self._metric: Any = CHRF(word_order=options.word_order, lowercase=options.lowercase)

    def score_items(self, items: Sequence[Item]) -> list[float]:
        """Sentence chrF of each item."""
        return [min(100.0, float(self._metric.sentence_score(i.answer, [i.reference]).score)) for i in items]

    def cell(self, items: Sequence[Item], scores: Sequence[float]) -> float:
        """Corpus chrF."""
        answers, references = [item.answer for item in items], [item.reference for item in items]
        return min(100.0, float(self._metric.corpus_score(answers, [references]).score))

    def facts(self, items: Sequence[Item]) -> dict[str, Any]:
        """sacrebleu's signature."""
        name = self._metric.corpus_score(["a"], [["a"]]).name  # the signature is complete only after a call
        return {"signature": f"{name}|{self._metric.get_signature()}"}


def load(model: str | None = None, options: Options | None = None) -> Chrf:
    """Check that the library is there."""
    require("chrf", "sacrebleu")
    return Chrf(options or Options())
