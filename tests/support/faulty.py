"""faulty: a method that fails, or is slow, on one rank at one place. For tests/integration/test_failing_ranks.py."""

import os
import signal
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from swift_cl.io import MethodState, write_json
from swift_cl.methods.base import Gradients, Method, MethodConfig, TaskContext, setting

STAMP = "failed_at.json"


@dataclass
class FaultyConfig(MethodConfig):
    """Flags of `faulty`."""

    at: str = setting("nowhere", "prepare_task, gradients, end_task, or nowhere.")
    rank: int = setting(0, "On this rank.")
    how: str = setting("raise", "raise, die (as if killed), or a number of seconds to sleep.")


class Faulty(Method):
    """Plain fine-tuning but for the fault."""

    name: ClassVar[str] = "faulty"
    title: ClassVar[str] = "Faults"
    config_class: ClassVar[type[MethodConfig]] = FaultyConfig
    needs_rows: ClassVar[bool] = True

    def _maybe(self, ctx: TaskContext, place: str) -> None:
        rank = int(os.environ.get("RANK", "0"))
        if self.config.at != place or rank != self.config.rank:
            return
        write_json(ctx.this_stage.dir / STAMP if ctx.model else ctx.generated_dir.parent.parent / STAMP, time.time())
        if self.config.how == "raise":
            raise ValueError(f"injected in {place}")
        if self.config.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(self.config.how))

    def prepare_task(self, ctx: TaskContext, rows: list[Any]) -> list[Any]:
        self._maybe(ctx, "prepare_task")
        return rows

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        if ctx.step == 2:
            self._maybe(ctx, "gradients")

    def end_task(self, ctx: TaskContext) -> MethodState:
        self._maybe(ctx, "end_task")
        return MethodState(meta={"done": True})
