"""Progress bars for long work beside the training: a Fisher, a selector, generated rows."""

from collections.abc import Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")

DELAY = 3.0
"""Seconds that work must take before its bar is seen, so that a step of a moment leaves no line behind."""


def progress_bar(what: str, total: int | None, unit: str, shown: bool = True, work: Any = None) -> Any:
    """A tqdm bar on stderr: a context manager with `update(count)`.

    Args:
        what: stands in front of the bar.
        shown: false on every process but one.
    """
    from tqdm import tqdm

    return tqdm(work, what, total, unit=unit, delay=DELAY, dynamic_ncols=True, disable=not shown)


def with_bar(
    work: Iterable[Item], what: str, unit: str, *, total: int | None = None, shown: bool = True
) -> Iterable[Item]:
    """The same items in the same order, with a bar while they are worked through.

    Args:
        total: how many there are, where `work` has no length.
    """
    bar: Iterable[Item] = progress_bar(what, total, unit, shown, work)
    return bar
