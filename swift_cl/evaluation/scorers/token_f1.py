"""Token F1 of SQuAD x 100: how many words answer and reference share, Chinese counted by character.

As SQuAD's own script: lower case, punctuation and the articles a, an, the removed, words split at spaces; the harmonic
mean of precision and recall over the multisets of words. Beyond it (for answers in plain English nothing changes):
NFKC and all Unicode punctuation, and each Chinese character or kana is a word, as in CMRC 2018 and MLQA. Where one side
has no word, the score is 100 if both texts are equal after normalisation, else 0; an empty answer scores 0.
"""

from collections import Counter
from collections.abc import Sequence

from swift_cl.evaluation.scorers._text import ARTICLES, UNSPACED, fold, is_punctuation

HIGHER_IS_BETTER = True
RANGE = (0.0, 100.0)


def tokens(text: str) -> list[str]:
    """Words of the normalised text."""
    plain = "".join(c for c in fold(text) if not is_punctuation(c))
    return [word for word in UNSPACED.sub(r" \g<0> ", plain).split() if word not in ARTICLES]


def f1(answer: str, reference: str) -> float:
    """0..100."""
    given, wanted = Counter(tokens(answer)), Counter(tokens(reference))
    if not given or not wanted:
        return 100.0 if given == wanted and answer.strip() and reference.strip() else 0.0
    shared = (given & wanted).total()
    return 200.0 * shared / (given.total() + wanted.total())


class TokenF1:
    """Scores pair by pair."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """F1 x 100 of each (answer, reference)."""
        return [f1(answer, reference) for answer, reference in pairs]


def load(model: str | None = None) -> TokenF1:
    """Ready at once: there is no model."""
    return TokenF1()
