"""Metrics of scenarios: what the matrices of a benchmark's views are called, and the change of general ability.

A view asks other questions about the same tasks and has a matrix of its own. The questions of the tasks themselves are
those of the benchmark; sources: the papers' text as in the formulas of `swift_cl.evaluation.metrics`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from swift_cl.evaluation.metrics import Cell

MAIN = ""
"""Stands for the questions of the tasks themselves."""
SCENARIOS: dict[str, dict[str, tuple[str, str]]] = {
    # Asked by a rephrased question; the view `edit` asks the question that was learned, `locality` unrelated ones.
    "knowledge_editing": {
        "edit_success": ("edit", "avg_acc"),
        "generalisation": (MAIN, "avg_acc"),
        "locality": ("locality", "avg_acc"),
    },
    # Concept-1K: the view `memorisation` asks what was learned, the tasks themselves in other words.
    "instance_incremental": {
        "ma": ("memorisation", "avg"),
        "ga": (MAIN, "avg"),
        "mf": ("memorisation", "forgetting"),
        "gf": (MAIN, "forgetting"),
    },
}
"""By scenario and metric: the view, and which of its metrics."""


def scenario_metrics(
    scenario: str, main: Mapping[str, Any], views: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Cell]]:
    """The metrics of a scenario by scorer; None where the metric that it is called after is None.

    Args:
        main: the scorers' parts of results.json.
        views: the same of each view.
    """
    return {
        scorer: {
            name: (main if view == MAIN else views[view])[scorer]["metrics"][metric]
            for name, (view, metric) in SCENARIOS[scenario].items()
        }
        for scorer in main
    }


def general_ability(base: Sequence[Cell], last: Sequence[Cell], higher_is_better: bool) -> dict[str, Any]:
    """How each probe changed from the base model to the last stage (negative = worse), and the mean over the probes.

    TRACE's Delta R^G = mean of (R_T - R_0). None where a probe was not measured before or after.
    """
    sign = 1.0 if higher_is_better else -1.0
    change = [
        None if before is None or after is None else sign * (after - before)
        for before, after in zip(base, last, strict=True)
    ]
    numbers = [value for value in change if value is not None]
    return {"change": change, "delta_g": math.fsum(numbers) / len(numbers) if len(numbers) == len(change) else None}
