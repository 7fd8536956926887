"""What a score can be at least and at most: shuffled references below, New.ACC and joint training above.

The floor of a task is what a scorer gives to other samples' references: fluent, of the right kind, and wrong. The rule
of the shuffle: every turn gets the reference of another turn, drawn by a seed from the content of the task, so that as
few turns as possible get a reference with the text of their own (none, unless one text is more than half of them);
those that do are not wrong answers and stay out of the mean. Without any wrong pair there is no floor.
"""

import contextlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.evaluation.scorers import Item
from swift_cl.io import read_json

FLOOR_SEED = 0
JOINT_TRAINING = "mtl"
"""The method whose one stage learns all tasks together."""


def shuffled(items: Sequence[Item], seed: int = FLOOR_SEED) -> list[Item]:
    """The items, each answered by another one's reference; those that would get their own text are left out.

    Equal references stand side by side in a ring, which is turned by the size of the largest group: so no turn gets
    its own text as long as no text is more than half of them, and as few as possible otherwise.
    """
    ordered = sorted(items, key=lambda item: (item.question, item.reference, item.id, item.turn))
    groups: dict[str, list[Item]] = {}
    for item in ordered:
        groups.setdefault(item.reference, []).append(item)
    generator = random.Random(seed)
    blocks = list(groups.values())
    generator.shuffle(blocks)
    for block in blocks:
        generator.shuffle(block)
    ring = [item for block in blocks for item in block]
    turn = max(map(len, blocks), default=0)
    pairs = [(item, ring[(place + turn) % len(ring)]) for place, item in enumerate(ring)]
    return [replace(item, answer=other.reference) for item, other in pairs if other.reference != item.reference]


def joint_row(results: Sequence[dict[str, Any]], run: dict[str, Any], scorer: str) -> tuple[str, list[float]] | None:
    """Name and scores of joint training, in the order of `run`'s tasks; None where there is none.

    Its row is the last one of its matrix that was measured in full. It counts when benchmark, base model and test data
    are the run's; among several, the one of the run's seed comes first.
    """
    found = []
    for entry in results:
        same = all(entry.get(key) == run.get(key) for key in ("benchmark", "model_id"))
        if entry.get("method") != JOINT_TRAINING or not same or scorer not in entry.get("scorers", {}):
            continue
        if _expected(entry) != _expected(run):
            continue
        full = [row for row in entry["scorers"][scorer]["matrix"] if row and None not in row]
        if full:
            by_task = dict(zip(entry["order"], full[-1], strict=True))
            different_seed = entry.get("seed") != run.get("seed")
            found.append((different_seed, str(entry.get("name")), [by_task[task] for task in run["order"]]))
    if not found:
        return None
    _, name, row = min(found)
    return name, row


def _expected(entry: dict[str, Any]) -> dict[str, int]:
    """Turns of each task's test data."""
    return dict(zip(entry["order"], entry.get("answers", {}).get("expected", []), strict=False))


def results_beside(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The results of joint training in folders beside a run; a neighbour's file that cannot be read is none."""
    found = []
    for path in sorted(run_dir.resolve().parent.glob(f"*/{name}")):
        with contextlib.suppress(UserError):
            value = read_json(path)
            if isinstance(value, dict) and value.get("method") == JOINT_TRAINING and "scorers" in value:
                found.append(value)
    return found
