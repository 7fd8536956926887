"""SARI x 100 of a simplification (Xu et al. 2016), the question being the text that was to be simplified.

For n-grams of 1 to 4 words: F1 of those kept, F1 of those added, precision of those deleted; each averaged over n, and
SARI is the mean of the three. The counts are those of the authors' script in the corrected form that tensor2tensor and
Hugging Face `evaluate` have, so that numbers compare with published ones (TRACE): 0 of 0 is 1, recall of keeping is a
ratio of sums, precisions are means over distinct n-grams. Words: runs of letters and digits and single signs of the
folded text, each Chinese character or kana a word of its own. An empty answer scores 0.

`source` is a regular expression with one group that cuts the text out of a question that holds an instruction as well,
such as `Paragraph:\\s*(.*)\\s*Simplified:` (a dot matches line ends); a question it does not match has no score.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from pydantic import field_validator

from swift_cl.evaluation.scorers import Item, Score, Unscored
from swift_cl.evaluation.scorers._options import ScorerOptions
from swift_cl.evaluation.scorers._text import UNSPACED, fold

HIGHER_IS_BETTER = True
RANGE = (0.0, 100.0)
ORDER = 4

Grams = Counter[tuple[str, ...]]


class Options(ScorerOptions):
    """Settings of a task."""

    source: str | None = None

    @field_validator("source")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"not a regular expression ({error})") from None
            if groups != 1:
                raise ValueError(f"must have one group, has {groups}")
        return value


def tokens(text: str) -> list[str]:
    """Words and signs of the folded text."""
    return re.findall(r"[^\W_]+|[^\s]", UNSPACED.sub(r" \g<0> ", fold(text)))


def _grams(words: Sequence[str], size: int) -> Grams:
    return Counter(zip(*(words[start:] for start in range(size)), strict=False))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _operations(source: Grams, answer: Grams, references: Sequence[Grams]) -> tuple[float, float, float]:
    """(F1 of keeping, F1 of adding, precision of deleting) for n-grams of one size, each 0..1.

    Counts of source and answer are multiplied by the number of references, so that an n-gram that half of them keep is
    worth half.
    """
    number = len(references)
    wanted = Counter[tuple[str, ...]]()
    for reference in references:
        wanted.update(reference)
    start = Counter({gram: count * number for gram, count in source.items()})
    end = Counter({gram: count * number for gram, count in answer.items()})

    kept, to_keep = start & end, start & wanted
    kept_well = kept & wanted
    keep_precision = _ratio(sum(kept_well[g] / kept[g] for g in kept), len(kept))
    keep_recall = _ratio(kept_well.total(), to_keep.total())

    deleted = start - end
    deleted_well = deleted - wanted
    delete_precision = _ratio(sum(deleted_well[g] / deleted[g] for g in deleted), len(deleted))

    added, to_add = answer.keys() - source.keys(), wanted.keys() - source.keys()
    added_well = len(added & to_add)
    add = _f1(_ratio(added_well, len(added)), _ratio(added_well, len(to_add)))
    return _f1(keep_precision, keep_recall), add, delete_precision


def sari(source: str, answer: str, references: Sequence[str]) -> float:
    """SARI x 100 of one answer."""
    if not answer.strip():
        return 0.0
    words, given, wanted = tokens(source), tokens(answer), [tokens(reference) for reference in references]
    by_size = [
        _operations(_grams(words, n), _grams(given, n), [_grams(w, n) for w in wanted]) for n in range(1, ORDER + 1)
    ]
    keep, add, delete = (math.fsum(values) / ORDER for values in zip(*by_size, strict=True))
    return 100.0 * (keep + add + delete) / 3


class Sari:
    """Scores item by item."""

    def __init__(self, options: Options) -> None:
        self._source = re.compile(options.source, re.DOTALL) if options.source else None

    def score_items(self, items: Sequence[Item]) -> list[Score]:
        """SARI of each item, or why it has none."""
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> Score:
        source = item.question
        if self._source is not None:
            match = self._source.search(source)
            if match is None or match[1] is None:
                return Unscored(f"sari.source {self._source.pattern!r} does not match the question")
            source = match[1]
        if not source.strip():
            return Unscored("there is no text that was to be simplified: the question is empty")
        return sari(source, item.answer, [item.reference])


def load(model: str | None = None, options: Options | None = None) -> Sari:
    """Ready at once: there is no model."""
    return Sari(options or Options())
