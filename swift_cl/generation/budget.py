"""How many rows each earlier task gets."""

import math
from collections.abc import Sequence
from fractions import Fraction


def total_rows(gamma: Fraction, current: int) -> int:
    """N = ceil(gamma |D_t|), in exact arithmetic: 0.07 x 100 is 7, where floats give 8."""
    return math.ceil(gamma * current)


def equal_shares(total: int, tasks: Sequence[str]) -> dict[str, int]:
    """N // k rows a task, one more for each of the first N mod k."""
    share, rest = divmod(total, len(tasks)) if tasks else (0, 0)
    return {task: share + (number < rest) for number, task in enumerate(tasks)}
