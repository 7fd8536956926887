"""What the LAMOL family shares: question rows and generation rows, and rows of earlier tasks by the previous model."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from swift_cl.generation.budget import equal_shares, total_rows
from swift_cl.generation.engine import Engine, Prompt
from swift_cl.generation.protocol import Order, exactly
from swift_cl.generation.screen import Screen, Turns
from swift_cl.io import MethodState
from swift_cl.methods._gen_rows import MARKS, GenRows, TaskMeta, check_task_name
from swift_cl.methods._generating import GenerationConfig, refuse_media
from swift_cl.methods._row_store import exact
from swift_cl.methods.base import Method, TaskContext, TrainingRow, setting

ALL_TASKS = "all"
"""Stands for the task where one prompt generates rows of every earlier one."""


@dataclass
class LamolFamilyConfig(GenerationConfig):
    """Flags of the LAMOL family."""

    gamma: float = setting(0.2, "Generated rows per row of the current task, in (0, 1], shared by the earlier tasks.")
    lambda_: float = setting(0.25, "Weight of the loss on generation rows, > 0.")
    token: str = setting(
        "task",
        "'task' has a generation prompt for every task; 'shared' one for all, so that what is generated is a mixture.",
        choices=("task", "shared"),
    )
    label_filter: str = setting(
        "auto", "'auto' drops answers outside a task's closed set of labels; 'off' keeps them.", choices=("auto", "off")
    )
    top_k: int = setting(20, "Sample among the k most likely tokens, >= 0; 0 is all.")

    def check(self, method: str) -> None:
        super().check(method)
        if not 0 < self.gamma <= 1:
            self.fail(method, "gamma", "a number in (0, 1]")
        if not 0 < self.lambda_ < math.inf:
            self.fail(method, "lambda_", "a number > 0 (with 0 nothing would learn to generate)")


def shares_of(gamma: float, metas: Sequence[TaskMeta], current: int) -> dict[str, int]:
    """ceil(gamma x current) rows in all, equally many of each task."""
    return equal_shares(total_rows(exact(gamma), current), [meta.task for meta in metas])


class GeneratedRehearsal(Method):
    """Rows of one stage: every own and generated row as question row and as generation row.

    Class attributes:
        taught: the channel of generation rows is `new/<taught>` or `pseudo/<taught>`.
    """

    needs_rows = True
    needs_logits = True
    replaces_loss = True
    taught: ClassVar[str] = "lm"
    config: GenerationConfig

    def __init__(self, config: GenerationConfig) -> None:
        super().__init__(config)
        self._tasks: list[TaskMeta] = []

    # --- what a method decides ---------------------------------------------------------------------------------------

    @abstractmethod
    def _wanted(self, metas: Sequence[TaskMeta], current: int) -> Mapping[str, int]:
        """How many rows to generate of each task, with so many rows in the current one."""

    def _rehearsed(self, ctx: TaskContext, earlier: list[TaskMeta]) -> list[TaskMeta]:
        """What is generated, one prompt each."""
        return earlier

    def _generator(self, ctx: TaskContext) -> Path:
        """The weights that generate."""
        return ctx.earlier[-1].weights_dir

    def _form(self, meta: TaskMeta) -> GenRows:
        """How the task's rows are written as text."""
        return GenRows(meta.task, meta.system)

    def _teaching(self, meta: TaskMeta, row: TrainingRow) -> TrainingRow | None:
        """The row that teaches to generate a row; None where there is none."""
        return self._form(meta).gen_row(row["messages"])

    def _prompt(self, meta: TaskMeta, number: int) -> Prompt:
        """What is asked for candidate `number`."""
        return self._form(meta).prompt

    def _read(self, meta: TaskMeta, text: str) -> Turns:
        """The turns that a generated text holds; raises `Rejected`."""
        return self._form(meta).parse(text)

    def _speaking(self, engine: Engine) -> Engine:
        """What answers such a prompt with a row as text."""
        return engine

    def _labels(self, meta: TaskMeta) -> list[str] | None:
        """The only answers that a generated row may have."""
        return meta.labels

    def _most(self, meta: TaskMeta) -> Mapping[str, int] | None:
        """Generated rows of each label at most."""
        return None

    # --- the rows ----------------------------------------------------------------------------------------------------

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        """Own rows, generated rows of all earlier tasks, and a generation row for each of them."""
        check_task_name(self.name, ctx.task)
        refuse_media(self.name, ctx.task, rows)
        own = TaskMeta.of(ctx.task, rows)
        earlier = [TaskMeta(**line) for line in ctx.previous_state().rows["tasks"]] if ctx.earlier else []
        self._tasks = [*earlier, own]
        tagged = self._tagged(ctx, own, rows, "new")
        numbers: dict[str, int] = {}
        rehearsed = self._rehearsed(ctx, earlier)
        if rehearsed:
            for meta, generated in self._generate(ctx, rehearsed, len(rows)):
                tagged += self._tagged(ctx, meta, generated, "pseudo")
                numbers[meta.task] = len(generated)
        ctx.record("manifest", {"schema_version": 1, "task": ctx.task, "own_rows": len(rows), "generated": numbers})
        return tagged

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        """What later stages must know of the tasks: their system prompts and labels."""
        return MethodState(rows={"tasks": [meta.to_json() for meta in self._tasks]}) if ctx.rank == 0 else None

    def _tagged(self, ctx: TaskContext, meta: TaskMeta, rows: Sequence[TrainingRow], origin: str) -> list[TrainingRow]:
        teaching = [self._teaching(meta, row) for row in rows]
        left_out = teaching.count(None)
        if left_out:
            ctx.notice(
                f"{left_out} of {len(rows)} rows of task '{meta.task}' have no generation row: their text holds one of "
                f"{', '.join(MARKS)}, or their turns do not alternate"
            )
        tagged = [{**row, "channel": f"{origin}/qa"} for row in rows]
        return tagged + [{**row, "channel": f"{origin}/{self.taught}"} for row in teaching if row is not None]

    def _generate(
        self, ctx: TaskContext, metas: Sequence[TaskMeta], current: int
    ) -> list[tuple[TaskMeta, list[TrainingRow]]]:
        """Rows of earlier tasks by an earlier model."""
        config, shares = self.config, self._wanted(metas, current)
        with ctx.engine(self._generator(ctx), config.gen_backend) as engine:
            orders = [self._order(ctx, meta, shares[meta.task], engine.special_tokens) for meta in metas]
            rules = config.rules(ctx, self.name)
            found = exactly(self._speaking(engine), orders, config.sampling(), rules, ctx.generated_dir, ctx.notice)
        return [(meta, [pseudo.row for pseudo in found[meta.task]]) for meta in metas]

    def _order(self, ctx: TaskContext, meta: TaskMeta, wanted: int, special: Sequence[str]) -> Order:
        form = self._form(meta)

        def fits(row: TrainingRow) -> bool:
            teaching = self._teaching(meta, row)
            return teaching is not None and all(ctx.encode([row, teaching]))

        screen: Any = Screen(
            parse=lambda text: self._read(meta, text),
            to_row=lambda turns, number: form.row(turns),
            fits=fits,
            forbidden=[*special, *MARKS],
            labels=self._labels(meta),
            most=self._most(meta),
        )
        return Order(meta.task, wanted, lambda number: self._prompt(meta, number), screen)


class LamolFamily(GeneratedRehearsal):
    """Own rows and a share of generated ones, equally many of each earlier task."""

    config: LamolFamilyConfig

    def _wanted(self, metas: Sequence[TaskMeta], current: int) -> Mapping[str, int]:
        return shares_of(self.config.gamma, metas, current)

    def _rehearsed(self, ctx: TaskContext, earlier: list[TaskMeta]) -> list[TaskMeta]:
        if earlier and self.config.token == "shared":
            return [TaskMeta(ALL_TASKS, sum(meta.rows for meta in earlier), None, None)]
        return earlier

    def _form(self, meta: TaskMeta) -> GenRows:
        # A prompt that all tasks share must generate the system prompt too: it tells them apart.
        return GenRows(None, None) if self.config.token == "shared" else GenRows(meta.task, meta.system)

    def _labels(self, meta: TaskMeta) -> list[str] | None:
        return meta.labels if self.config.label_filter == "auto" else None
