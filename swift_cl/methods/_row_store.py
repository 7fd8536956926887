"""Rows of earlier tasks: what replay mixes in and what gem measures its constraints on.

Every task keeps an ordered list, the most useful row first, so that making room for a new task is cutting off tails.
The store travels in a `MethodState`: one JSON line a row, and a manifest of what was seen and kept of each task.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from swift_cl.errors import UserError
from swift_cl.io import MethodState, sha256_json
from swift_cl.methods._draws import slots_up_to
from swift_cl.methods.base import TaskContext, TrainingRow

if TYPE_CHECKING:
    import torch
else:
    from swift_cl.lazy import LazyModule

    torch = LazyModule("torch")

# Everything that makes up what a row says; bookkeeping columns are not part of its identity.
_CONTENT = ("messages", "images", "videos", "audios", "tools", "objects")
_ENCODED_AT_ONCE = 256


def row_id(row: TrainingRow) -> str:
    """A row's identity: the hash of its messages (system prompt included) and media."""
    return sha256_json({key: row[key] for key in _CONTENT if row.get(key)})


@dataclass(frozen=True)
class StoredRow:
    """A row, where it comes from, and its class if the strategy used classes."""

    id: str
    task: str
    row: TrainingRow
    label: str | None = None

    @classmethod
    def of(cls, row: TrainingRow, task: str, label: str | None = None) -> "StoredRow":
        """Wrap a training row."""
        return cls(row_id(row), task, row, label)

    def to_json(self) -> dict[str, Any]:
        """One line of the store's file."""
        line: dict[str, Any] = {"id": self.id, "task": self.task}
        if self.label is not None:
            line["class"] = self.label
        return {**line, "row": self.row}

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "StoredRow":
        """The inverse of `to_json`."""
        return cls(line["id"], line["task"], line["row"], line.get("class"))


@dataclass
class SeenTask:
    """What the manifest says of a task: its rows, how many the template would drop, and how many were looked at."""

    task: str
    num_seen: int
    dropped: int


@dataclass
class RowStore:
    """The rows kept of all tasks so far.

    Attributes:
        rows: in task order and, within a task, most useful first (with a reservoir: in slot order).
        seen: all tasks so far, also those of which no row is left.
        settings: how the rows were chosen, for the manifest and for the next stage's checks.
        stream_length: with a reservoir, the number of rows that have passed it.
    """

    rows: list[StoredRow] = field(default_factory=list)
    seen: list[SeenTask] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    stream_length: int = 0

    @classmethod
    def load(cls, ctx: TaskContext, method: str) -> "RowStore":
        """The store of the previous stage; an empty one in the first task.

        Raises:
            UserError: it is missing, damaged, or of other tasks than this run's earlier ones.
        """
        if not ctx.earlier:
            return cls()
        state = ctx.previous_state()
        source = f"{ctx.earlier[-1].state_dir / method}.json"
        if "store" not in state.rows or "store" not in state.meta:
            raise UserError(f"{source}: no row store in it; was the earlier stage trained with '{method}'?")
        meta = state.meta["store"]
        store = cls(
            rows=[StoredRow.from_json(line) for line in state.rows["store"]],
            seen=[SeenTask(**{key: entry[key] for key in ("task", "num_seen", "dropped")}) for entry in meta["seen"]],
            settings=meta["settings"],
            stream_length=meta["stream_length"],
        )
        known, expected = [task.task for task in store.seen], [task.task for task in ctx.earlier]
        if known != expected:
            raise UserError(f"{source}: rows of tasks {known}, but this run's earlier tasks are {expected}")
        return store

    def state(self) -> MethodState:
        """The store as a method's state."""
        seen = []
        for entry in self.seen:
            kept = self.of_task(entry.task)
            line = {**dataclasses.asdict(entry), "stored": len(kept)}
            labels = [row.label for row in kept if row.label is not None]
            if labels:
                line["classes"] = {label: labels.count(label) for label in sorted(set(labels))}
            seen.append(line)
        meta = {"seen": seen, "settings": self.settings, "stream_length": self.stream_length}
        return MethodState(rows={"store": [row.to_json() for row in self.rows]}, meta={"store": meta})

    def of_task(self, task: str) -> list[StoredRow]:
        """The rows of a task, in order."""
        return [row for row in self.rows if row.task == task]

    def shares(self, budget: int, total: bool, newcomers: int) -> list[int]:
        """How many rows each task may keep at most when a new one joins that has `newcomers` usable rows and is last.

        Args:
            budget: rows over all tasks where `total`, else rows per task.
        """
        available = [len(self.of_task(entry.task)) for entry in self.seen] + [newcomers]
        return fair_shares(budget, available) if total else [budget] * len(available)

    def add(self, seen: SeenTask, ordered: Sequence[StoredRow], shares: Sequence[int]) -> None:
        """Cut every task down to its share and append the new one."""
        lists = [self.of_task(entry.task) for entry in self.seen] + [list(ordered)]
        self.seen.append(seen)
        self.rows = [row for kept, share in zip(lists, shares, strict=True) for row in kept[:share]]

    def stream(self, seen: SeenTask, arriving: Sequence[StoredRow], capacity: int, seed: int) -> None:
        """Let rows pass a reservoir that spans all tasks."""
        self.seen.append(seen)
        draws = slots_up_to(self.stream_length, len(arriving), seed)
        self.rows = reservoir(self.rows, arriving, capacity, self.stream_length, draws)
        self.stream_length += len(arriving)


def reservoir(
    slots: Sequence[StoredRow], arriving: Sequence[StoredRow], capacity: int, passed: int, draws: Sequence[int]
) -> list[StoredRow]:
    """Vitter's algorithm R: every row that ever passed is kept with the same probability.

    Args:
        passed: rows that passed before.
        draws: for each arriving row number i, counted over all tasks, a number from 0 to i.
    """
    slots = list(slots)
    for number, (row, slot) in enumerate(zip(arriving, draws, strict=True), start=passed):
        if number < capacity:
            slots.append(row)
        elif slot < capacity:
            slots[slot] = row
    return slots


def round_half_up(value: Fraction) -> int:
    """21 for 20.5, where Python's round() gives 20."""
    return math.floor(value + Fraction(1, 2))


def exact(value: float) -> Fraction:
    """The decimal number that was typed: 0.1 is one tenth, not its nearest float."""
    return Fraction(str(value))


def largest_remainder(total: int, weights: Sequence[int]) -> list[int]:
    """Split `total` in proportion to `weights`; what rounding leaves goes to larger fractions, then lower indexes."""
    whole = sum(weights)
    if whole == 0:
        return [0] * len(weights)
    parts = [Fraction(total * weight, whole) for weight in weights]
    counts = [math.floor(part) for part in parts]
    by_fraction = sorted(range(len(parts)), key=lambda i: (counts[i] - parts[i], i))
    for i in by_fraction[: total - sum(counts)]:
        counts[i] += 1
    return counts


def fair_shares(total: int, available: Sequence[int]) -> list[int]:
    """Equal shares, capped by what is available; what a small one leaves goes to the others."""
    shares = [0] * len(available)
    waiting = list(range(len(available)))
    while waiting and total > 0:
        wanted = dict(zip(waiting, largest_remainder(total, [1] * len(waiting)), strict=True))
        capped = [i for i in waiting if wanted[i] >= available[i]]
        for i in capped or waiting:
            shares[i] = min(wanted[i], available[i])
            total -= shares[i]
        waiting = [i for i in waiting if i not in capped] if capped else []
    return shares


def usable_rows(
    ctx: TaskContext,
    rows: Sequence[TrainingRow],
    order: Sequence[int],
    wanted: int,
    usable: Callable[[dict[str, Any]], bool] = bool,
) -> tuple[list[int], int]:
    """The first `wanted` indexes of `order` whose rows the training template keeps; the ranks share the encoding.

    Args:
        usable: says whether an encoded row can be used; a row that the template drops is an empty dict.

    Returns:
        The indexes, and how many rows were found unusable on the way.
    """
    kept: list[int] = []
    dropped = 0
    at_once = _ENCODED_AT_ONCE * ctx.world_size
    for start in range(0, len(order), at_once):
        window = order[start : start + at_once]
        mine = [rows[i] for i in window[ctx.rank :: ctx.world_size]]
        flags = torch.zeros(len(window), device=ctx.device)
        good = [float(usable(encoded)) for encoded in ctx.encode(mine)]
        flags[ctx.rank :: ctx.world_size] = torch.tensor(good, device=ctx.device)
        for i, flag in zip(window, ctx.all_reduce_sum(flags).tolist(), strict=True):
            if len(kept) == wanted:
                return kept, dropped
            if flag > 0.5:
                kept.append(i)
            else:
                dropped += 1
    return kept, dropped
