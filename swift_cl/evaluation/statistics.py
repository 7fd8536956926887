"""Several runs of a method (seeds, task orders) as mean, standard deviation and interval; who wins, if anybody does.

Pure functions on numbers. The interval is the percentile bootstrap of the mean (scipy, 9999 resamples, a fixed seed):
it is defined for any number of runs from two on, where BCa is not. With two or three runs the 95 % interval is the
range from the lowest value to the highest, and it is too narrow up to about ten, so n is always shown beside it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swift_cl.evaluation.metrics import FORMULAS, LEVELS

CONFIDENCE = 0.95
RESAMPLES = 9999
SEED = 0


@dataclass(frozen=True)
class Summary:
    """What several runs gave for one metric.

    Attributes:
        n: number of runs.
        missing: in how many of them the metric is null; if there is one, nothing is averaged over the hole.
        mean: None if a run has no value.
        std: sample standard deviation (ddof 1), None for fewer than two runs.
        low, high: ends of the bootstrap interval of the mean, None for fewer than two runs.
    """

    n: int
    missing: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high), or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def summarise(values: Sequence[float | None], confidence: float = CONFIDENCE, seed: int = SEED) -> Summary:
    """Summary of one metric over runs; None stands for a run that does not have it."""
    known = [value for value in values if value is not None]
    missing = len(values) - len(known)
    if missing or not known:
        return Summary(len(values), missing, None, None, None, None)
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Summary(1, 0, mean, None, None, None)
    low, high = bootstrap_interval(known, confidence, seed)
    return Summary(len(known), 0, mean, statistics.stdev(known), low, high)


def bootstrap_interval(
    values: Sequence[float], confidence: float = CONFIDENCE, seed: int = SEED
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of two or more values; equal values give an interval without width.

    The values are sorted first, so that their order changes nothing.
    """
    ordered = sorted(values)
    if ordered[0] == ordered[-1]:
        return ordered[0], ordered[0]
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(ordered),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def larger_is_better(metric: str, scorer_higher_is_better: bool) -> bool:
    """Direction of a metric: levels have the scorer's, forgetting is better low, the other differences high."""
    assert metric in FORMULAS, metric
    if metric in LEVELS:
        return scorer_higher_is_better
    return metric != "forgetting"


def winner(summaries: Mapping[str, Summary], larger: bool) -> str | None:
    """The one whose interval lies wholly on the better side of every other's; None where any two at the top overlap.

    Nobody wins alone, and nobody wins against one whose spread is not known (a single run, a missing value).
    """
    intervals = {name: summary.interval for name, summary in summaries.items()}
    if len(intervals) < 2 or None in intervals.values():
        return None
    ends = {name: interval for name, interval in intervals.items() if interval is not None}
    for name, (low, high) in ends.items():
        others = [interval for other, interval in ends.items() if other != name]
        if all(low > other_high if larger else high < other_low for other_low, other_high in others):
            return name
    return None
