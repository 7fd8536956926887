"""One file a scorer; a scorer is looked up by module name, or by entry point in the group `swift_cl.scorers`.

A scorer module defines:

    HIGHER_IS_BETTER: bool          direction, respected by the metrics and the report
    RANGE: tuple[float, float]      lowest and highest score it can give
    load(model: str | None)         -> a `PairScorer` or an `ItemScorer`

and may define:

    Options                         a pydantic model of its settings in a benchmark file (`scorer_options`); `load` is
                                    then called as load(model, options), once for each task's settings
    NEEDS: str                      what has to be there beyond swift_cl, for `swift-cl ls scorers`
    CELL: str                       how a cell of the matrix comes from its answers; default: their mean
    FLOOR: bool                     whether shuffled references tell its floor (default True; False spares the cost)

`load` fails with a `UserError` when something it needs is missing; it runs before any server starts. An entry point
names such a module. Scores are percent (or the scorer's stated unit). How to write one: assets/scorers.md.
"""

import importlib
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Protocol, cast

from swift_cl.errors import RunFailure, UserError, did_you_mean

GROUP = "swift_cl.scorers"
SLACK = 1e-6
"""How far rounding may carry a score over its range."""


@dataclass(frozen=True)
class Item:
    """One answered turn, with everything that a scorer may look at.

    Attributes:
        system: the system prompt of the data row, or else of its task.
        id, turn: which sample of the task's test data, and which of its turns (from 0).
        labels: in a scenario of classification the labels that were visible to the stage, else empty.
    """

    answer: str
    reference: str
    question: str = ""
    task: str = ""
    system: str | None = None
    id: str = ""
    turn: int = 0
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unscored:
    """Stands for a score that could not be had: its cell is null, and the reason is told; it never becomes a 0."""

    reason: str


Score = float | Unscored


class PairScorer(Protocol):
    """What `load` returns when answer and reference are all that counts."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> Sequence[Score]:
        """One score for each (answer, reference), in order."""


class ItemScorer(Protocol):
    """What `load` returns when more than answer and reference counts.

    Two more methods are called where a scorer has them: `cell(items, scores) -> float` gives the cell of the matrix
    (default: the mean of the scores), `facts(items) -> dict` gives JSON values about these scores for results.json.
    """

    def score_items(self, items: Sequence[Item]) -> Sequence[Score]:
        """One score for each item, in order. The items of several cells and tasks come in one call."""


@dataclass(frozen=True)
class LoadedScorer:
    """A scorer that is ready, under the name its column of results has."""

    name: str
    scorer: Any
    higher_is_better: bool
    range: tuple[float, float]
    has_floor: bool = True

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Scores of (answer, reference) pairs."""
        return self.score_items([Item(answer, reference) for answer, reference in pairs])

    def score_items(self, items: Sequence[Item]) -> list[Score]:
        """Scores of the items, checked to be as many as the items and within the range.

        Raises:
            RunFailure: they are not; the scorer is wrong then, and nothing it says can be used.
        """
        if hasattr(self.scorer, "score_items"):
            scores = list(cast(ItemScorer, self.scorer).score_items(items))
        else:
            pairs = [(item.answer, item.reference) for item in items]
            scores = list(cast(PairScorer, self.scorer).score(pairs))
        if len(scores) != len(items):
            raise RunFailure(f"scorer {self.name!r} gave {len(scores)} scores for {len(items)} answers")
        low, high = self.range
        for item, score in zip(items, scores, strict=True):
            if not isinstance(score, Unscored) and not (low - SLACK <= score <= high + SLACK):
                where = f" (task {item.task}, sample {item.id}, turn {item.turn})" if item.task else ""
                raise RunFailure(f"scorer {self.name!r} gave {score!r}, which is not within {low:g}..{high:g}{where}")
        return scores

    def cell(self, items: Sequence[Item], scores: Sequence[float]) -> float:
        """The matrix's cell of these answers, of which there is at least one."""
        if hasattr(self.scorer, "cell"):
            return float(self.scorer.cell(items, scores))
        return math.fsum(scores) / len(scores)

    def facts(self, items: Sequence[Item]) -> dict[str, Any]:
        """JSON values about how these items were scored; empty for most scorers."""
        return dict(self.scorer.facts(items)) if hasattr(self.scorer, "facts") else {}


def _own() -> set[str]:
    return {info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")}


def names() -> list[str]:
    """Names of all scorers, ours and those of other packages."""
    return sorted(_own() | {point.name for point in entry_points(group=GROUP)})


def module(name: str) -> ModuleType:
    """The module of a scorer.

    Raises:
        UserError: no scorer has that name, or two have it.
    """
    own = _own()
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if len(points) + (name in own) > 1:
        sources = ", ".join(point.value for point in points)
        raise UserError(f"scorer {name!r} is registered more than once ({sources}); uninstall one of them")
    if points:
        loaded = points[0].load()
        assert isinstance(loaded, ModuleType), f"entry point {points[0].value} of {GROUP} is not a module"
        return loaded
    if name not in own:
        raise UserError(f"scorer {name!r} is unknown, allowed: {', '.join(names())}{did_you_mean(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def load(
    name: str, model: str | None = None, options: Mapping[str, Any] | None = None, where: str = "scorer_options"
) -> LoadedScorer:
    """Make a scorer ready.

    Args:
        model: what `--scorer_model` gave, for scorers that use one.
        options: its settings, see `Options` of its module.
        where: how an error names the place of the settings.

    Raises:
        UserError: the scorer, or a setting, is unknown or wrong; or something that it needs is missing.
    """
    from swift_cl.evaluation.scorers._options import parse

    found = module(name)
    parsed = parse(found, name, options or {}, where)
    scorer = found.load(model) if parsed is None else found.load(model, parsed)
    direction = getattr(parsed, "higher_is_better", found.HIGHER_IS_BETTER)
    return LoadedScorer(name, scorer, direction, found.RANGE, getattr(found, "FLOOR", True))
