"""How many answers may be missing before an evaluation counts as failed (`--fail_on_error`)."""

import math
from dataclasses import dataclass

from swift_cl.errors import UserError


@dataclass(frozen=True)
class ErrorBudget:
    """At most `count` missing answers, or at most the share `fraction` of them; with neither, any number.

    A missing answer is one that failed for good or was not asked. Its cell is null whatever the budget says: the
    budget decides about the exit code, never about the table.
    """

    count: int | None = 0
    fraction: float | None = None

    def allows(self, missing: int, turns: int) -> bool:
        """Whether so many of so many turns may be without an answer."""
        if self.fraction is not None:
            return missing <= self.fraction * turns
        return self.count is None or missing <= self.count


def parse_budget(text: str) -> ErrorBudget:
    """`true` (no answer may be missing), `false` (any number may), a whole number, or a fraction below 1.

    Raises:
        UserError: it is none of these.
    """
    word = text.strip().lower()
    if word in ("true", "false"):
        return ErrorBudget(0 if word == "true" else None)
    if word.isdigit():
        return ErrorBudget(int(word))
    try:
        fraction = float(word)
    except ValueError:
        fraction = math.nan
    if not 0 <= fraction < 1:
        raise UserError(
            f"--fail_on_error {text!r}: expected true, false, a number such as 10, or a fraction such as 0.01"
        )
    return ErrorBudget(None, fraction)
