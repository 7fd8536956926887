"""faulty: a method that fails, or is slow, on one rank at one place. For tests/integration/test_failing_ranks.py."""

import os
import signal
import time
from typing import Any, ClassVar

from swift_cl.io import MethodState, write_json
from swift_cl.methods.base import Gradients, Method, TaskContext

STAMP = "failed_at.json"
FAULT = "FAULTY"
"""Environment variable `PLACE RANK HOW`: in prepare_task, gradients or end_task of that rank raise, die (as if killed),
or sleep for a number of seconds. Not a flag, because a stage is continued with the flags that it began with."""


class Faulty(Method):
    """Plain fine-tuning but for the fault."""

    name: ClassVar[str] = "faulty"
    title: ClassVar[str] = "Faults"
    needs_rows: ClassVar[bool] = True

    def _maybe(self, ctx: TaskContext, place: str) -> None:
        at, rank, how = os.environ.get(FAULT, "nowhere 0 raise").split()
        if at != place or os.environ.get("RANK", "0") != rank:
            return
        write_json(ctx.this_stage.dir / STAMP if ctx.model else ctx.generated_dir.parent.parent / STAMP, time.time())
        if how == "raise":
            raise ValueError(f"injected in {place}")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(how))

    def prepare_task(self, ctx: TaskContext, rows: list[Any]) -> list[Any]:
        self._maybe(ctx, "prepare_task")
        return rows

    def gradients(self, ctx: TaskContext, grads: Gradients) -> None:
        if ctx.step == 2:
            self._maybe(ctx, "gradients")

    def end_task(self, ctx: TaskContext) -> MethodState:
        self._maybe(ctx, "end_task")
        return MethodState(meta={"done": True})
