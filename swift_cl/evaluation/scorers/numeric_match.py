"""Numeric match: 100 when the last number of the answer equals the last number of the reference, else 0.

A number is digits with an optional sign, decimals (`3.50`, `.5`, `3,5`) and exponent (`1e-3`); full-width digits count.
Thousands may be set apart by commas, apostrophes, no-break or thin spaces (`1,234`, `1'234`); where comma and point
both occur the last one starts the decimals (`1.234,5` is 1234.5). A single comma after one to three digits (not 0) and
before exactly three is a thousands comma, any other starts decimals; a single point always does. A percent sign is
dropped: 50 % equals 50, not 0.5. Currency signs and units are ignored; words for numbers, fractions and 万 are not
read. A hyphen after a digit or letter is no sign.

Numbers are equal when they differ by at most `tolerance`, or by at most `relative_tolerance` times the reference's
size; by default exactly, in decimal arithmetic. An answer without a number is wrong; a reference without one leaves its
answer without a score.
"""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

from pydantic import Field

from swift_cl.evaluation.scorers import Score, Unscored
from swift_cl.evaluation.scorers._options import ScorerOptions

HIGHER_IS_BETTER = True
RANGE = (0.0, 100.0)
NUMBER = re.compile(
    r"(?:(?<![^\W_])[-+])?"
    r"(?:[1-9]\d{0,2}(?:(?P<gap>[',])\d{3})(?:(?P=gap)\d{3})*(?!\d)(?:\.\d+)?"  # 1,234,567.8
    r"|[1-9]\d{0,2}(?:\.\d{3})+,\d+"  # 1.234.567,8
    r"|[1-9]\d{0,2}(?:\.\d{3}){2,}(?!\d)"  # 1.234.567
    r"|\d+(?:[.,]\d+)?"
    r"|(?<!\d)\.\d+)"
    r"(?:e[-+]?\d{1,3}(?![^\W_]))?",
    re.IGNORECASE,
)
_SIGNS = str.maketrans(dict.fromkeys("\u2212\u2013", "-") | dict.fromkeys("\u2019\u00a0\u202f\u2009", "'"))


class Options(ScorerOptions):
    """Settings of a task."""

    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    relative_tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or None."""
    plain = unicodedata.normalize("NFKC", text.translate(_SIGNS))
    found = [match[0] for match in NUMBER.finditer(plain)]
    return _value(found[-1]) if found else None


def _value(number: str) -> Decimal:
    digits, sign, exponent = number.lower().replace("'", "").partition("e")
    comma, point = digits.rfind(","), digits.rfind(".")
    if comma >= 0 and point >= 0:
        thousands, decimal = (",", ".") if point > comma else (".", ",")
        digits = digits.replace(thousands, "").replace(decimal, ".")
    elif digits.count(",") > 1 or re.fullmatch(r"[-+]?[1-9]\d{0,2},\d{3}", digits):
        digits = digits.replace(",", "")
    elif digits.count(".") > 1:
        digits = digits.replace(".", "")
    return Decimal(digits.replace(",", ".") + sign + exponent)


class NumericMatch:
    """Scores pair by pair."""

    def __init__(self, options: Options) -> None:
        self._absolute = Decimal(str(options.tolerance))
        self._relative = Decimal(str(options.relative_tolerance))

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """100 or 0 for each (answer, reference)."""
        return [self._one(answer, reference) for answer, reference in pairs]

    def _one(self, answer: str, reference: str) -> Score:
        right = last_number(reference)
        if right is None:
            return Unscored(f"the reference {reference[:60]!r} holds no number")
        given = last_number(answer)
        if given is None:
            return 0.0
        return 100.0 if abs(given - right) <= max(self._absolute, self._relative * abs(right)) else 0.0


def load(model: str | None = None, options: Options | None = None) -> NumericMatch:
    """Ready at once: there is no model."""
    return NumericMatch(options or Options())
