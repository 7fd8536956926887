"""SSR's tasks as rows, and stages of a synthesising method driven by hand."""

import re
from pathlib import Path

from swift_cl.io import load_method_state, save_method_state
from tests.support.fake_context import FakeContext
from tests.support.fake_engine import Engines, FakeEngine, said

DEFINITION = "Name the kind of the thing."


def kind_rows(task, count, system="You sort things."):
    """Rows in SSR's format: definition, blank line, input."""
    return [
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": f"{DEFINITION}\n\n{task} thing {i}"},
                {"role": "assistant", "content": f"{task} kind {i}"},
            ]
        }
        for i in range(count)
    ]


def inventive(prompt, seed):
    """A base model that makes up a new row every time, named after the task that its prompt shows."""
    task = re.findall(r"^Input: (\w+) thing", prompt.text, re.M)[-1]
    return said(f" {task} invention {seed}\nOutput: made up {seed}")


class KeptText(FakeContext):
    """Keeps rows of up to `max_words` words, as a template keeps rows that are short enough."""

    max_words = 1000

    def encode(self, rows):
        return [
            row if sum(len(m["content"].split()) for m in row["messages"]) <= self.max_words else {} for row in rows
        ]


def stages(method, folder, tasks, rows=None, base=inventive, latest=None, context=KeptText):
    """Run a method over tasks; returns (what it trains on, context, state) of every stage.

    `latest(prompt, seed)` speaks for every stage's weights; the engines remember what they were asked.
    """
    found = []
    for number, task in enumerate(tasks):
        stage = Path(folder) / f"stage_{number + 1}"
        state = found[-1][2] if found else None
        ctx = context(task=task, earlier=tasks[:number], state=state, folder=stage)
        engines = {None: FakeEngine(base, "base")}
        for earlier in ctx.earlier:
            engines[earlier.weights_dir] = FakeEngine(latest or base, f"theta({earlier.task})")
        ctx.engines = Engines(engines)
        ctx.rows = rows[task] if rows else kind_rows(task, 20)
        run = method()
        mixed = run.prepare_task(ctx, ctx.rows)
        save_method_state(stage / "cl_state", run.name, run.end_task(ctx))
        found.append((mixed, ctx, load_method_state(stage / "cl_state", run.name)))
    return found
