"""Exact match after normalisation: 100 for an equal answer, 0 for another one."""

from collections.abc import Sequence

from swift_cl.evaluation.scorers._text import fold

HIGHER_IS_BETTER = True
RANGE = (0.0, 100.0)
_FINAL = ".!?。!?…"  # NFKC turns the full-width marks into ASCII ones, the ideographic full stop stays


def normalise(text: str) -> str:
    """NFKC, case folded, one space between words, no final punctuation."""
    return " ".join(fold(text).split()).rstrip(_FINAL).rstrip()


class ExactMatch:
    """Compares normalised texts. An empty answer never matches, not even a reference of punctuation alone."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """100 or 0 for each (answer, reference)."""
        return [100.0 if normalise(a) == normalise(r) and a.strip() else 0.0 for a, r in pairs]


def load(model: str | None = None) -> ExactMatch:
    """Ready at once: there is no model."""
    return ExactMatch()
