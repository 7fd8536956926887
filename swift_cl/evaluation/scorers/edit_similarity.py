"""Edit similarity x 100 of the characters (rapidfuzz): 100 for an equal answer.

`indel` (default) is 1 - insertions and deletions / total length, which is `fuzz.ratio`, the number of CodeXGLUE, TRACE
and most code-completion tables. `levenshtein` also counts replacements, over the longer length. Characters are Unicode
code points after NFC; case and spaces count. An empty answer scores 0.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from swift_cl.evaluation.scorers._library import require
from swift_cl.evaluation.scorers._options import ScorerOptions

HIGHER_IS_BETTER = True
RANGE = (0.0, 100.0)
NEEDS = "extra scorers (rapidfuzz)"


class Options(ScorerOptions):
    """Settings of a task."""

    distance: Literal["indel", "levenshtein"] = "indel"


class EditSimilarity:
    """Scores pair by pair."""

    def __init__(self, options: Options) -> None:
        from rapidfuzz import distance

        kind: Any = distance.Indel if options.distance == "indel" else distance.Levenshtein
        self._similarity = kind.normalized_similarity

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Similarity x 100 of each (answer, reference)."""
        return [
            100.0 * float(self._similarity(unicodedata.normalize("NFC", a), unicodedata.normalize("NFC", r)))
            if a.strip()
            else 0.0
            for a, r in pairs
        ]


def load(model: str | None = None, options: Options | None = None) -> EditSimilarity:
    """Check that the library is there."""
    require("edit_similarity", "rapidfuzz")
    return EditSimilarity(options or Options())
