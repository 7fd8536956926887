"""Tasks whose rows say where they come from, stored and replayed."""

from swift_cl.methods.replay import Replay, ReplayConfig
from tests.support.language_model import TokenContext, token_row


def task_rows(task, count, **columns):
    """Rows of different prompts; the system prompt names the task."""
    rows = []
    for i in range(count):
        row = token_row([1 + i % 40, 1 + i // 40, 2], [1 + i % 3])
        row["messages"][0]["content"] = f"you are {task}"
        rows.append({**row, **{name: values[i % len(values)] for name, values in columns.items()}})
    return rows


def replay(**settings):
    method = Replay(ReplayConfig(**settings))
    method.config.validate()
    return method


def stored(sizes, context=TokenContext, prepare=None, **settings):
    """The state after tasks t0, t1, ... of these sizes."""
    state = None
    for number, size in enumerate(sizes):
        ctx = context(task=f"t{number}", earlier=[f"t{k}" for k in range(number)], state=state)
        ctx.rows = task_rows(f"t{number}", size) if prepare is None else prepare(number, size)
        state = replay(**settings).end_task(ctx)
    return state


def mixed(state, current, tasks=1, context=TokenContext, global_batch=8, world_size=1, **settings):
    """(rows to train on, the record of what was drawn) of the task after the stored ones."""
    ctx = context(task="now", earlier=[f"t{k}" for k in range(tasks)], state=state, world_size=world_size)
    ctx.global_batch = global_batch
    ctx.rows = current
    return replay(**settings).prepare_task(ctx, current), ctx.records.get("manifest")
