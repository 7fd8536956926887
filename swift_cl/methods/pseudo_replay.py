"""pseudo_replay: rows of earlier tasks as the base model makes them up in context; SSR without answers of the latest
model and without a choice."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from swift_cl.generation.budget import equal_shares
from swift_cl.generation.protocol import exactly
from swift_cl.io import MethodState
from swift_cl.methods._generating import GenerationConfig, refuse_media
from swift_cl.methods._synthesis import STOP, TaskFacts
from swift_cl.methods.base import Method, TaskContext, TrainingRow, setting


@dataclass
class PseudoReplayConfig(GenerationConfig):
    """Flags of `pseudo_replay`."""

    num_samples: int = setting(200, "Generated rows of every earlier task, >= 1.")
    shots: int = setting(5, "Real rows shown in a prompt, >= 1.")
    demo_ratio: float = setting(
        0.01, "Share of a task's rows that are shown in prompts, in (0, 1]; at least pseudo_replay_shots."
    )
    when: str = setting(
        "finish",
        "'finish' generates a task's rows once and keeps them; 'prepare' generates them anew for every later stage.",
        choices=("finish", "prepare"),
    )
    keep: str = setting(
        "all",
        "'all' takes valid rows as they come; 'balanced' equally many of each label where the labels are a closed set.",
        choices=("all", "balanced"),
    )
    top_k: int = setting(40, "Sample among the k most likely tokens, >= 0; 0 is all.")
    top_p: float = setting(0.95, "Sample among the most likely tokens of this total probability, in (0, 1].")

    def validate(self) -> None:
        self.check("pseudo_replay")
        for name in ("num_samples", "shots"):
            if getattr(self, name) < 1:
                self.fail("pseudo_replay", name, "1 or more")
        if not 0 < self.demo_ratio <= 1:
            self.fail("pseudo_replay", "demo_ratio", "a number in (0, 1]")


class PseudoReplay(Method):
    """Ordinary training on D_t and N rows (x, y) of every earlier task, x and y in-context from theta_0."""

    name: ClassVar[str] = "pseudo_replay"
    title: ClassVar[str] = "In-context pseudo replay"
    summary: ClassVar[str] = "rows of earlier tasks as the base model makes them up in context"
    cost: ClassVar[str] = "none (more rows, generation before training)"
    paper: ClassVar[str] = ""
    config_class: ClassVar[type[GenerationConfig]] = PseudoReplayConfig
    needs_rows: ClassVar[bool] = True
    config: PseudoReplayConfig

    def __init__(self, config: PseudoReplayConfig) -> None:
        super().__init__(config)
        self._facts: list[TaskFacts] = []
        self._pseudo: list[dict[str, Any]] = []

    def prepare_task(self, ctx: TaskContext, rows: list[TrainingRow]) -> list[TrainingRow]:
        """Add the generated rows of all earlier tasks."""
        config = self.config
        refuse_media(self.name, ctx.task, rows)
        own = TaskFacts.of(ctx.task, rows, self.name, config.demo_ratio, config.shots, config.seed(ctx))
        if not ctx.earlier:
            self._facts = [own]
            return rows
        state = ctx.previous_state()
        facts = [TaskFacts.from_json(line) for line in state.rows["tasks"]]
        self._facts = [*facts, own]
        if config.when == "finish":
            self._pseudo = state.rows.get("pseudo", []) + self._generate(ctx, facts[-1:])
        else:
            self._pseudo = self._generate(ctx, facts)
        by_task = dict(Counter(line["task"] for line in self._pseudo))
        ctx.record("manifest", {"schema_version": 1, "task": ctx.task, "own_rows": len(rows), "generated": by_task})
        return rows + [line["row"] for line in self._pseudo]

    def _generate(self, ctx: TaskContext, facts: Sequence[TaskFacts]) -> list[dict[str, Any]]:
        config = self.config
        with ctx.engine(None, config.gen_backend) as engine:
            orders = []
            for task in facts:
                order = task.order(ctx, engine, config.num_samples, config.shots, task.labels, config.seed(ctx))
                if config.keep == "balanced" and task.labels is not None:
                    order.screen.most = equal_shares(config.num_samples, task.labels)
                orders.append(order)
            rules = config.rules(ctx, self.name)
            found = exactly(engine, orders, config.sampling((STOP,)), rules, ctx.generated_dir, ctx.notice)
        stage = ctx.task_index + 1
        return [
            {
                "task": task,
                "row": pseudo.row,
                "cl": {"id": f"{self.name}/t{stage}/{task}/{i:06d}", "stage": ctx.task, **pseudo.origin},
            }
            for task, rows in found.items()
            for i, pseudo in enumerate(rows)
        ]

    def end_task(self, ctx: TaskContext) -> MethodState | None:
        """What a later stage needs to generate rows of this task, and the rows of the earlier ones."""
        if ctx.rank != 0:
            return None
        return MethodState(rows={"tasks": [facts.to_json() for facts in self._facts], "pseudo": self._pseudo})
