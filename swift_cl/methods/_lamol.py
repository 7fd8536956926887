"""What the LAMOL family shares: question rows and generation rows, and rows of earlier tasks by the previous model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift_cl.generation.budget import equal_shares, total_rows
from swift_cl.generation.protocol import Order, exactly
from swift_cl.generation.screen import Screen
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


class LamolFamily(Method):
    """Rows of one stage: every own and generated row as question row and as generation row."""

    needs_rows = True
    needs_logits = True
    replaces_loss = True
    config: LamolFamilyConfig

    def __init__(self, config: LamolFamilyConfig) -> None:
        super().__init__(config)
        self._tasks: list[TaskMeta] = []

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        """Own rows, generated rows of all earlier tasks, and a generation row for each of them."""
        check_task_name(self.name, ctx.task)
        refuse_media(self.name, ctx.task, rows)
        own = TaskMeta.of(ctx.task, rows)
        earlier = [TaskMeta(**line) for line in ctx.previous_state().rows["tasks"]] if ctx.earlier else []
        self._tasks = [*earlier, own]
        tagged = self._tagged(ctx, own, rows, "new")
        numbers: dict[str, int] = {}
        if earlier:
            for meta, generated in self._generate(ctx, earlier, len(rows)):
                tagged += self._tagged(ctx, meta, generated, "pseudo")
                numbers[meta.task] = len(generated)
        ctx.record("manifest", {"schema_version": 1, "task": ctx.task, "own_rows": len(rows), "generated": numbers})
        return tagged

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        """What later stages must know of the tasks: their system prompts and labels."""
        return MethodState(rows={"tasks": [meta.to_json() for meta in self._tasks]}) if ctx.rank == 0 else None

    def _form(self, meta: TaskMeta) -> GenRows:
        # A prompt that all tasks share must generate the system prompt too: it tells them apart.
        return GenRows(None, None) if self.config.token == "shared" else GenRows(meta.task, meta.system)

    def _tagged(self, ctx: TaskContext, meta: TaskMeta, rows: Sequence[TrainingRow], origin: str) -> list[TrainingRow]:
        form = self._form(meta)
        teaching = [form.gen_row(row["messages"]) for row in rows]
        left_out = teaching.count(None)
        if left_out:
            ctx.notice(
                f"{left_out} of {len(rows)} rows of task '{meta.task}' have no generation row: their text holds one of "
                f"{', '.join(MARKS)}, or their turns do not alternate"
            )
        tagged = [{**row, "channel": f"{origin}/qa"} for row in rows]
        return tagged + [{**row, "channel": f"{origin}/lm"} for row in teaching if row is not None]

    def _generate(
        self, ctx: TaskContext, earlier: Sequence[TaskMeta], current: int
    ) -> list[tuple[TaskMeta, list[TrainingRow]]]:
        """Rows of the earlier tasks by the previous stage's model."""
        config = self.config
        total = total_rows(exact(config.gamma), current)
        metas = list(earlier)
        if config.token == "shared":
            metas = [TaskMeta(ALL_TASKS, sum(meta.rows for meta in earlier), None, None)]
        shares = equal_shares(total, [meta.task for meta in metas])
        with ctx.engine(ctx.earlier[-1].weights_dir, config.gen_backend) as engine:
            orders = [self._order(ctx, meta, shares[meta.task], engine.special_tokens) for meta in metas]
            rules = config.rules(ctx, self.name)
            found = exactly(engine, orders, config.sampling(), rules, ctx.generated_dir, ctx.notice)
        return [(meta, [pseudo.row for pseudo in found[meta.task]]) for meta in metas]

    def _order(self, ctx: TaskContext, meta: TaskMeta, wanted: int, special: Sequence[str]) -> Order:
        form = self._form(meta)

        def fits(row: TrainingRow) -> bool:
            teaching = form.gen_row(row["messages"])
            return teaching is not None and all(ctx.encode([row, teaching]))

        screen: Any = Screen(
            parse=form.parse,
            to_row=lambda turns, number: form.row(turns),
            fits=fits,
            forbidden=[*special, *MARKS],
            labels=meta.labels if self.config.label_filter == "auto" else None,
        )
        return Order(meta.task, wanted, lambda number: form.prompt, screen)
