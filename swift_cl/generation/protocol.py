"""The protocol "exactly N": rounds of candidates, screened in order, until every task has its rows.

Round 0 asks for 1.2 candidates a row, later rounds for what is missing by the acceptance so far; all tasks share the
batches of a round. What is too much is dropped, what is missing is an error or said, and never filled with other rows.
"""

import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from swift_cl.errors import RunFailure
from swift_cl.generation.engine import Answer, Engine, Prompt, Sampling
from swift_cl.generation.files import read_round, round_file, write_outcome, write_round
from swift_cl.generation.screen import Rejected, Row, Screen

logger = logging.getLogger("swift_cl")

SPARE = Fraction(6, 5)
"""Candidates asked per row that is wanted."""
MOST_A_ROW = 10
"""Candidates per row at most, over all rounds."""


@dataclass
class Order:
    """What is wanted of one earlier task.

    Attributes:
        task: its name.
        wanted: N_j.
        prompt: the prompt of candidate number i, counted over all rounds.
        screen: decides on the candidates.
    """

    task: str
    wanted: int
    prompt: Callable[[int], Prompt]
    screen: Screen


@dataclass(frozen=True)
class Rules:
    """Settings of the protocol.

    Attributes:
        method, stage, seed: go into every candidate's seed.
        batch_size: prompts of one engine call at most.
        min_fill: share of N_j below which it is an error; with 0 no shortfall is one.
        spare: candidates per wanted row in round 0.
        keep_all: keep every valid candidate, also beyond N_j, for a choice that comes later.
    """

    method: str
    stage: str
    seed: int
    batch_size: int = 64
    max_rounds: int = 5
    min_fill: Fraction = Fraction(1, 2)
    spare: Fraction = SPARE
    keep_all: bool = False


@dataclass(frozen=True)
class Pseudo:
    """A kept row and where it comes from (`origin` is JSON)."""

    row: Row
    origin: dict[str, Any]


@dataclass(frozen=True)
class _Slot:
    order: Order
    round: int
    slot: int  # within the round and task
    candidate: int  # over all rounds
    prompt: Prompt
    seed: int


@dataclass
class _Progress:
    asked: int = 0
    kept: list[Pseudo] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)


def slot_seed(rules: Rules, task: str, number: int, slot: int) -> int:
    """A candidate's seed: 63 bits, which every engine takes."""
    key = "\x1f".join(map(str, (rules.seed, rules.method, rules.stage, task, number, slot)))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def exactly(
    engine: Engine,
    orders: Sequence[Order],
    sampling: Sampling,
    rules: Rules,
    folder: Path,
    notice: Callable[[str], None],
) -> dict[str, list[Pseudo]]:
    """N_j rows of every task (with `keep_all` at least N_j), by task.

    Args:
        folder: the files of this generation; finished rounds in it are used again.

    Raises:
        RunFailure: a task got no row, or fewer than `min_fill` of its rows.
    """
    progress = {order.task: _Progress() for order in orders}
    rejects: list[dict[str, Any]] = []
    for number in range(rules.max_rounds):
        slots = [slot for order in orders for slot in _slots(order, progress[order.task], rules, number)]
        if not slots:
            break
        for slot, answer in zip(slots, _answers(engine, slots, sampling, rules, folder), strict=True):
            state = progress[slot.order.task]
            if rules.keep_all or len(state.kept) < slot.order.wanted:
                _screen(slot, answer, state, rejects, engine)
    kept = {task: state.kept for task, state in progress.items()}
    manifest = {
        "generator": dict(engine.identity),
        "sampling": sampling.to_json(),
        "rules": {**vars(rules), "min_fill": str(rules.min_fill), "spare": str(rules.spare)},
        "tasks": {
            order.task: {
                "requested": order.wanted,
                "asked": progress[order.task].asked,
                "accepted": len(kept[order.task]),
                "rejected": dict(sorted(progress[order.task].rejected.items())),
            }
            for order in orders
        },
    }
    write_outcome(folder, [{**p.row, "cl": p.origin} for rows in kept.values() for p in rows], rejects, manifest)
    for order in orders:
        _check(order, progress[order.task], rules, notice)
    return kept


def _slots(order: Order, state: _Progress, rules: Rules, number: int) -> list[_Slot]:
    missing = order.wanted - len(state.kept)
    if missing <= 0:
        return []
    if number == 0:
        count = math.ceil(rules.spare * order.wanted)
    else:
        count = math.ceil(SPARE * missing * state.asked / max(len(state.kept), 1))
    count = min(count, MOST_A_ROW * order.wanted - state.asked)
    first = state.asked
    state.asked += count
    return [
        _Slot(order, number, i, first + i, order.prompt(first + i), slot_seed(rules, order.task, number, i))
        for i in range(count)
    ]


def _answers(engine: Engine, slots: Sequence[_Slot], sampling: Sampling, rules: Rules, folder: Path) -> list[Answer]:
    """The answers of a round, in the order of its slots; from its file where the round was finished before."""
    depends_on = {
        "generator": dict(engine.identity),
        "sampling": sampling.to_json(),
        "batch_size": rules.batch_size,
        "prompts": [[slot.prompt.sha256, slot.seed] for slot in slots],
    }
    path = round_file(folder, slots[0].round, depends_on)
    done = read_round(path, len(slots))
    if done is not None:
        logger.info(f"{rules.method}: round {slots[0].round} of {len(slots)} candidates was generated before: {path}")
        return done
    begin = time.perf_counter()
    answers = in_batches(engine, [s.prompt for s in slots], sampling, [s.seed for s in slots], rules.batch_size)
    seconds = time.perf_counter() - begin
    tokens = sum(answer.tokens for answer in answers)
    logger.info(
        f"{rules.method}: round {slots[0].round}: {len(slots)} candidates, {tokens} tokens in {seconds:.1f} s "
        f"({tokens / max(seconds, 1e-9):.0f}/s)"
    )
    origins = [{"task": slot.order.task, "slot": slot.slot, "seed": slot.seed} for slot in slots]
    write_round(path, answers, origins)
    return answers


def in_batches(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int], batch_size: int
) -> list[Answer]:
    """Answers in the order of the prompts; the batches hold prompts of similar length and are of nearly one size."""
    by_length = sorted(range(len(prompts)), key=lambda i: (prompts[i].length, i))
    batches = math.ceil(len(prompts) / batch_size)
    order = [
        by_length[number * len(prompts) // batches : (number + 1) * len(prompts) // batches]
        for number in range(batches)
    ]
    asked = [([prompts[i] for i in own], [seeds[i] for i in own]) for own in order]
    found: dict[int, Answer] = {}
    for own, answers in zip(order, engine.answer_batches(asked, sampling), strict=True):
        found.update(zip(own, answers, strict=True))
    return [found[i] for i in range(len(prompts))]


def _screen(slot: _Slot, answer: Answer, state: _Progress, rejects: list[dict[str, Any]], engine: Engine) -> None:
    origin = {
        "source_task": slot.order.task,
        "round": slot.round,
        "slot": slot.slot,
        "seed": slot.seed,
        "raw": answer.text,
        "finish_reason": answer.finish_reason,
    }
    try:
        row = slot.order.screen.look(answer, slot.candidate)
    except Rejected as reason:
        state.rejected[str(reason)] += 1
        rejects.append({**origin, "reason": str(reason)})
        return
    made_by = {"generator": dict(engine.identity), "prompt_sha256": slot.prompt.sha256, "refined_by": None}
    state.kept.append(Pseudo(row, {**origin, **made_by}))


def _check(order: Order, state: _Progress, rules: Rules, notice: Callable[[str], None]) -> None:
    kept, wanted = len(state.kept), order.wanted
    if wanted == 0:
        notice(f"task '{order.task}' gets no generated row: none is wanted of it")
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in state.rejected.most_common()) or "none"
    summary = f"{min(kept, wanted)} of {wanted} rows of task '{order.task}' from {state.asked} candidates"
    logger.info(f"{rules.method}: {summary}; dropped: {reasons}")
    if kept >= wanted:
        return
    if rules.min_fill > 0 and (kept == 0 or kept < rules.min_fill * wanted):
        raise RunFailure(
            f"{rules.method}: only {summary} were usable (dropped: {reasons}); train the earlier tasks longer, or "
            f"change the sampling, or lower --{rules.method}_min_fill (now {float(rules.min_fill):g})"
        )
    notice(f"only {summary} were usable (dropped: {reasons})")
