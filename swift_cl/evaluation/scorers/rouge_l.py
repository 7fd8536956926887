"""ROUGE-L x 100: F1 of the longest common subsequence of words (rouge-score), Chinese words by jieba.

Words are runs of letters and digits of the folded text, unstemmed; for English these are the words of rouge-score's
own tokeniser. Runs of Chinese characters are cut by jieba's dictionary. A text without words scores 0.
"""

import re
from collections.abc import Sequence
from typing import Any

from swift_cl.evaluation.scorers._library import cache_dir, require
from swift_cl.evaluation.scorers._text import UNSPACED, fold, has_unspaced

HIGHER_IS_BETTER = True
RANGE = (0.0, 100.0)
NEEDS = "extra scorers (rouge-score, jieba)"


class Words:
    """rouge-score's tokeniser protocol; jieba's dictionary is read when the first Chinese text comes."""

    def __init__(self) -> None:
        self._jieba: Any = None

    def tokenize(self, text: str) -> list[str]:
        """Words in order."""
        runs = re.findall(r"[^\W_]+", fold(text))
        return [word for run in runs for word in (self._cut(run) if has_unspaced(run) else [run])]

    def _cut(self, run: str) -> list[str]:
        if self._jieba is None:
            import logging

            import jieba

            jieba.setLogLevel(logging.WARNING)
            self._jieba = jieba.Tokenizer()
            # Its default is a file in the shared folder for temporary files, which anybody can write.
            folder = cache_dir("jieba")
            folder.mkdir(parents=True, exist_ok=True)
            self._jieba.tmp_dir = str(folder)
        parts = re.split(f"((?:{UNSPACED.pattern})+)", run)
        return [word for part in parts if part for word in (self._jieba.cut(part) if has_unspaced(part) else [part])]


class RougeL:
    """Scores pair by pair."""

    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self._scorer = RougeScorer(["rougeL"], tokenizer=Words())

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """ROUGE-L F1 x 100 of each (answer, reference)."""
        return [100.0 * float(self._scorer.score(reference, answer)["rougeL"].fmeasure) for answer, reference in pairs]


def load(model: str | None = None) -> RougeL:
    """Check that the libraries are there."""
    require("rouge_l", "rouge_score", "jieba")
    return RougeL()
