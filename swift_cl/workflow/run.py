"""`swift-cl run`: plan, train, evaluate, report; every part is skipped where its result is there already."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from swift_cl import distributed
from swift_cl.errors import RunFailure, UserError
from swift_cl.io import write_jsonl
from swift_cl.stages import STAGE_FILE, check_started_from, load_stage
from swift_cl.stream.benchmark import Benchmark, ScorerOptions, Task
from swift_cl.stream.disk import check_on_disk
from swift_cl.stream.labels import labels_of
from swift_cl.stream.readers import needed_files
from swift_cl.training.flags import flag_values
from swift_cl.workflow import provenance
from swift_cl.workflow.chain import record
from swift_cl.workflow.config import RunConfig
from swift_cl.workflow.plan import PLAN_FILE, RunPlan, check_against_existing, flags, make_plans, training_file


def check_rows(config: RunConfig, benchmark: Benchmark) -> dict[str, tuple[int | None, int]]:
    """Read every data file of the order (of a streamed one the head).

    Returns:
        by task the number of training rows (None where they are streamed) and of test rows.

    Raises:
        UserError: a file is missing, or a row is wrong.
    """
    tasks = tasks_of(config, benchmark)
    also_asked = benchmark.also_asked(tasks)
    check_on_disk(benchmark, [*tasks, *also_asked])
    for task in also_asked:
        task.test_rows()
    counts: dict[str, tuple[int | None, int]] = {}
    asked = []
    for task in tasks:
        if config.streaming:
            task.check_streamed()
        train = None if config.streaming else len(task.train_rows())
        asked.append(task.test_rows())
        counts[task.name] = train, len(asked[-1])
    labels_of(benchmark, tasks, asked)
    return counts


def check_evaluation(
    config: RunConfig,
    benchmark: Benchmark,
    scorers: Sequence[str],
    scorer_options: ScorerOptions,
    decoding: str | None = None,
) -> None:
    """Refuse scorers and settings that the evaluation would refuse, before anything is trained.

    Args:
        scorers, scorer_options, decoding: what the flags of `swift-cl eval` say.
    """
    from swift_cl.evaluation.constrained import CONSTRAINED, check_labels
    from swift_cl.evaluation.scoring import check_scoring

    if config.mode != "train_only":
        check_scoring(benchmark, tasks_of(config, benchmark), scorers, scorer_options)
        if decoding == CONSTRAINED:
            check_labels(benchmark)


def tasks_of(config: RunConfig, benchmark: Benchmark) -> list[Task]:
    """The tasks of all orders of the configuration, each once."""
    return list({task.name: task for order in config.orders for task in benchmark.order(order)}.values())


def check_train_flags(plans: list[RunPlan]) -> None:
    """Refuse flags of the training that ms-swift does not know, as the training process itself will.

    It imports ms-swift, which takes seconds: for the preview. A run meets the same check as its first act.
    """
    from swift_cl.training.arguments import check_known_flags

    for name in dict.fromkeys(name for plan in plans for stage in plan.stages for name in flag_values(stage.argv)):
        check_known_flags([name])


def prepare(config: RunConfig, benchmark: Benchmark, overwrite: bool) -> list[RunPlan]:
    """Check everything, then write plans and data files; nothing is trained.

    Raises:
        UserError: a wrong setting or row; the folder holds a run with other settings or, with `overwrite`, something
            that is no run.
    """
    plans = make_plans(config, benchmark)
    check_rows(config, benchmark)
    for plan in plans:
        folder = Path(plan.run_dir)
        if not overwrite:
            check_against_existing(plan)
        elif folder.exists() and any(folder.iterdir()) and not (folder / PLAN_FILE).is_file():
            raise UserError(f"{folder}: --overwrite deletes only what `swift-cl run` made, and this has no {PLAN_FILE}")
    for plan, single in zip(plans, config.singles(), strict=True):
        folder, tasks = Path(plan.run_dir), [benchmark.tasks[name] for name in plan.order]
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        trained_on = [file for t in tasks for file in needed_files(t.train, t.file_format, t.train_options)]
        provenance.save(folder, provenance.describe(single, benchmark, plan.order), trained_on)
        plan.save()
        for task in tasks:
            file = training_file(task, folder, config.streaming)
            if file != task.train:
                write_jsonl(file, [{"id": row.id, **row.as_training_row(None)} for row in task.train_rows()])
    return plans


def is_trained(plan: RunPlan) -> bool:
    """Whether every stage of the plan is finished."""
    return all((Path(stage.dir) / STAGE_FILE).is_file() for stage in plan.stages)


def train(plans: list[RunPlan], verbose: bool, anew: bool = False) -> None:
    """Train what is missing, in one process (or one a GPU) for all plans.

    Args:
        anew: whatever is there, another node is about to delete it (`--overwrite`).

    Raises:
        UserError, RunFailure: what the training process reported.
    """
    missing = [plan for plan in plans if anew or not is_trained(plan)]
    if missing:
        from swift_cl.workflow.launch import launch

        if not verbose:
            os.environ.setdefault("LOG_LEVEL", "ERROR")
        code = launch("chain", [plan.run_dir for plan in plans])
        if code != 0:
            planned = [stage for plan in missing for stage in plan.stages]
            stopped = next((s for s in planned if not (Path(s.dir) / STAGE_FILE).is_file()), planned[-1])
            raise RunFailure(
                f"training ended with exit code {code} in {stopped.dir}; its output is above, finished stages are kept"
            )
    for plan in plans:
        stages = [load_stage(Path(stage.dir)) for stage in plan.stages]
        for stage, previous in zip(stages, [None, *stages], strict=False):
            check_started_from(stage, previous)
        if distributed.node()[0] == 0:
            record(Path(plan.run_dir), stages[0])


def eval_argv(config: RunConfig, plans: list[RunPlan]) -> list[str]:
    """The command line of the evaluation; it logs to the trackers of the training unless it names its own."""
    values = dict(config.eval)
    trackers = config.train.get("report_to")
    names = trackers.split() if isinstance(trackers, str) else list(trackers or [])
    if names and names not in (["none"], ["all"]):
        values.setdefault("report_to", names)
    return [*(plan.run_dir for plan in plans), *flags(values)]
