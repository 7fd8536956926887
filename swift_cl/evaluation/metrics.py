"""Metrics of a stage x task matrix: pure functions, percent in and percent out.

`R[t][i]` is the score on task i after stage t (both counted from 1 in the formulas, as papers do); row 0 is the base
model. A cell that was not measured is None, and a metric that needs such a cell is None as well and names it: nothing
is averaged over a hole. Sources: Continual-NExT's README and tables (Avg.ACC, New.ACC, Forgetting with the positive
sign of the tables), GEM and EasyCL (BWT, FWT), Concept-1K (incremental average). For a scorer whose lower values are
better the formulas run on -R, and averages are printed in the scorer's own unit again, so that `forgetting` is positive
when a task got worse and `bwt` negative, whatever the direction.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = float | None
Location = tuple[int, int]

FORMULAS = {
    "avg_acc": "(1/T) sum_i R[T,i]; higher = better",
    "forgetting": "(1/(T-1)) sum_{i<T} (max_{i<=j<T} R[j,i] - R[T,i]); positive = worse",
    "new_acc": "(1/T) sum_i R[i,i]; higher = better",
    "bwt": "(1/(T-1)) sum_{i<T} (R[T,i] - R[i,i]); negative = forgetting",
    "fwt": "(1/(T-1)) sum_{i>=2} (R[i-1,i] - R[0,i]); positive = transfer",
    "last": "(1/T) sum_i R[T,i]; EasyCL's name of avg_acc",
    "avg": "(1/T) sum_t (1/t) sum_{i<=t} R[t,i]; incremental average, higher = better",
}
LEVELS = ("avg_acc", "new_acc", "last", "avg")
"""Metrics in the scorer's own unit; the others are differences, signed so that better is a rise."""


@dataclass(frozen=True)
class Matrix:
    """A measured matrix.

    Attributes:
        order: task names; row k is the model after learning `order[k]`.
        rows: T rows of T cells, percent; None where not measured.
        base: the untrained model's row, or None when it was not asked at all.
    """

    order: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    base: tuple[Cell, ...] | None = None

    def __post_init__(self) -> None:
        size = len(self.order)
        if size == 0:
            raise ValueError("the order names no task")
        if len(self.rows) != size or any(len(row) != size for row in self.rows):
            raise ValueError(f"expected {size} rows of {size} cells")
        if self.base is not None and len(self.base) != size:
            raise ValueError(f"the base row has {len(self.base)} cells, expected {size}")
        for row in (*self.rows, self.base or ()):
            if any(cell is not None and not math.isfinite(cell) for cell in row):
                raise ValueError("a cell is not a finite number")

    @property
    def size(self) -> int:
        """T, the number of tasks."""
        return len(self.order)

    def cell(self, stage: int, task: int) -> Cell:
        """R[stage, task], counted from 1; stage 0 is the base model."""
        if stage == 0:
            return None if self.base is None else self.base[task - 1]
        return self.rows[stage - 1][task - 1]


@dataclass(frozen=True)
class Metrics:
    """What `compute` found.

    Attributes:
        values: every key of `FORMULAS`; None where it is undefined or needs a cell that is missing.
        missing: for a metric that is None because of holes, the cells (stage, task) it needs, counted from 1.
        reasons: for a metric that is None by definition, why.
    """

    values: dict[str, Cell]
    missing: dict[str, list[Location]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def has_holes(self) -> bool:
        """Whether some metric could not be computed because a cell it needs is missing."""
        return bool(self.missing)

    def as_json(self) -> dict[str, Any]:
        """The object stored in results.json: the values, and what is missing if anything is."""
        value: dict[str, Any] = dict(self.values)
        if self.missing:
            value["missing_cells"] = {name: [list(cell) for cell in cells] for name, cells in self.missing.items()}
        if self.reasons:
            value["undefined"] = dict(self.reasons)
        return value


def _needs(size: int) -> dict[str, list[Location]]:
    """The cells each metric reads."""
    tasks = range(1, size + 1)
    old = range(1, size)
    last_row = [(size, i) for i in tasks]
    diagonal = [(i, i) for i in tasks]
    return {
        "avg_acc": last_row,
        "last": last_row,
        "new_acc": diagonal,
        "bwt": [(i, i) for i in old] + [(size, i) for i in old],
        "forgetting": [(j, i) for i in old for j in range(i, size + 1)],
        "fwt": [cell for i in range(2, size + 1) for cell in ((i - 1, i), (0, i))],
        "avg": [(t, i) for t in tasks for i in range(1, t + 1)],
    }


def _mean(terms: Sequence[float]) -> float:
    return math.fsum(terms) / len(terms)


def _formulas(size: int, r: Callable[[int, int], float]) -> dict[str, Callable[[], float]]:
    tasks, old = range(1, size + 1), range(1, size)
    return {
        "avg_acc": lambda: _mean([r(size, i) for i in tasks]),
        "last": lambda: _mean([r(size, i) for i in tasks]),
        "new_acc": lambda: _mean([r(i, i) for i in tasks]),
        "bwt": lambda: _mean([r(size, i) - r(i, i) for i in old]),
        "forgetting": lambda: _mean([max(r(j, i) for j in range(i, size)) - r(size, i) for i in old]),
        "fwt": lambda: _mean([r(i - 1, i) - r(0, i) for i in range(2, size + 1)]),
        "avg": lambda: _mean([_mean([r(t, i) for i in range(1, t + 1)]) for t in tasks]),
    }


def compute(matrix: Matrix, higher_is_better: bool = True) -> Metrics:
    """All metrics of a matrix; see the module for their null rules and signs."""
    sign = 1.0 if higher_is_better else -1.0

    def signed(stage: int, task: int) -> float:
        cell = matrix.cell(stage, task)
        assert cell is not None, "the cells a metric needs were checked"
        return sign * cell

    needs, formulas = _needs(matrix.size), _formulas(matrix.size, signed)
    values: dict[str, Cell] = {}
    missing: dict[str, list[Location]] = {}
    reasons: dict[str, str] = {}
    for name in FORMULAS:
        holes = [location for location in needs[name] if matrix.cell(*location) is None]
        values[name] = None
        if matrix.size == 1 and name in ("bwt", "forgetting", "fwt"):
            reasons[name] = "undefined for T = 1"
        elif name == "fwt" and matrix.base is None:
            reasons[name] = "needs the base model's row"
        elif holes:
            missing[name] = holes
        else:
            values[name] = formulas[name]() * (sign if name in LEVELS else 1.0)
    return Metrics(values, missing, reasons)
