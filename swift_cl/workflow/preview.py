"""The plan of a run as text that can be pasted into a shell: a comment and a command for each stage."""

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from swift_cl.distributed import node
from swift_cl.methods.registry import get_method
from swift_cl.training.flags import first, flag_values
from swift_cl.workflow.plan import RunPlan, StagePlan

Counts = Mapping[str, tuple[int | None, int]]
"""By task the number of training rows (None where they are streamed) and of test rows."""

SWIFT_BATCH = 16
"""Rows of an optimizer step when nobody says how many micro-batches it has (ms-swift's default)."""


def preview(plans: Sequence[RunPlan], eval_argv: Sequence[str] | None, counts: Counts | None = None) -> str:
    """Every command, data set and path; with `counts` also rows and steps."""
    lines = []
    for plan in plans:
        lines.append(f"# {plan.method}, seed {plan.seed}: {' -> '.join(plan.order)} into {plan.run_dir}")
        before: str | None = None
        for number, stage in enumerate(plan.stages, start=1):
            fresh = before is None or get_method(plan.method).starts_fresh
            start = "starts from the base model" if fresh else f"starts from {Path(before or '').name}"
            rows = "" if counts is None else f"{rows_and_steps(stage, *counts[stage.task])}; "
            lines.append(f"# stage {number} of {len(plan.stages)}, {stage.task}: {rows}{start}")
            argv = stage.argv + (["--cl_previous", before] if before else [])
            lines.append("swift-cl sft " + shlex.join(argv))
            before = stage.dir
    if eval_argv is not None:
        if counts is not None:
            base = sum(counts[task][1] for task in {task for plan in plans for task in plan.order})
            stages = sum(counts[task][1] * len(plan.stages) for plan in plans for task in plan.order)
            lines.append(f"# {base + stages:,} dialogues: every test row, asked of the base model and of every stage")
        lines.append("swift-cl eval " + shlex.join(eval_argv))
    return "\n".join(lines)


def rows_and_steps(stage: StagePlan, train: int | None, test: int) -> str:
    """`152 training rows, about 152 steps of 8; 46 test rows`."""
    given = flag_values(stage.argv)
    processes = int(os.environ.get("NPROC_PER_NODE") or 1) * node()[1]
    batch = int(first(given, "per_device_train_batch_size") or 1) * processes
    whole = batch * int(first(given, "gradient_accumulation_steps") or max(1, math.ceil(SWIFT_BATCH / batch)))
    most = int(first(given, "max_steps") or 0)
    tested = f"{test:,} test rows"
    if most > 0 or train is None:
        rows = "training rows are streamed" if train is None else f"{train:,} training rows"
        return f"{rows}, {most:,} steps of {whole}; {tested}"
    epochs = float(first(given, "num_train_epochs") or 3)
    # A method may add rows of earlier tasks, so it is "about".
    return f"{train:,} training rows, about {math.ceil(math.ceil(train / whole) * epochs):,} steps of {whole}; {tested}"
