"""One file a scorer; a scorer is looked up by module name, or by entry point in the group `swift_cl.scorers`.

A scorer module defines:

    HIGHER_IS_BETTER: bool          direction, respected by the metrics and the report
    RANGE: tuple[float, float]      lowest and highest score it can give
    load(model: str | None) -> Scorer

`load` fails with a `UserError` when something it needs is missing; it runs before any server starts. An entry point
names such a module. Scores are percent (or the scorer's stated unit).
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import Protocol

from swift_cl.errors import UserError, did_you_mean

GROUP = "swift_cl.scorers"


class Scorer(Protocol):
    """What `load` returns."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """One score for each (answer, reference), in order."""


@dataclass(frozen=True)
class LoadedScorer:
    """A scorer that is ready, under the name its column of results has."""

    name: str
    scorer: Scorer
    higher_is_better: bool
    range: tuple[float, float]

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Scores of the pairs, checked to be as many as the pairs."""
        scores = self.scorer.score(pairs)
        if len(scores) != len(pairs):
            raise RuntimeError(f"scorer {self.name!r} gave {len(scores)} scores for {len(pairs)} answers")
        return scores


def names() -> list[str]:
    """Names of all scorers, ours and those of other packages."""
    own = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(own | {point.name for point in entry_points(group=GROUP)})


def module(name: str) -> ModuleType:
    """The module of a scorer.

    Raises:
        UserError: no scorer has that name, or two have it.
    """
    own = {info.name for info in pkgutil.iter_modules(__path__)}
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


def load(name: str, model: str | None = None) -> LoadedScorer:
    """Make a scorer ready; `model` is what `--scorer_model` gave, for scorers that use one."""
    found = module(name)
    return LoadedScorer(name, found.load(model), found.HIGHER_IS_BETTER, found.RANGE)
