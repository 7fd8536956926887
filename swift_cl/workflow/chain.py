"""The training process of `swift-cl run`: all stages of all plans, with the base model loaded once."""

import gc
import os
import time
from pathlib import Path
from typing import Any

from swift_cl import distributed
from swift_cl.io import read_json
from swift_cl.stages import STAGE_FILE, Run, Stage, check_started_from, load_stage
from swift_cl.workflow.plan import PLAN_FILE

LOGGING_DIR_NAME = "TENSORBOARD_LOGGING_DIR"
LOGGING_DIR = os.environ.get(LOGGING_DIR_NAME)
"""What the user says of it, if anything."""


def say(text: str) -> None:
    """One progress line, on rank 0."""
    if distributed.world()[0] == 0:
        print(text, flush=True)


def finished(folder: Path, previous: Stage | None) -> Stage | None:
    """The stage in `folder` if it is complete and was trained from `previous`.

    Raises:
        UserError: it was trained from other weights than the stage before now has.
    """
    if not (folder / STAGE_FILE).is_file():
        return None
    stage = load_stage(folder)
    check_started_from(stage, previous)
    return stage


def record(folder: Path, first: Stage) -> None:
    """Write run.json from plan.json and the run's first stage: what the evaluation reads."""
    plan = read_json(folder / PLAN_FILE)
    described = {key: plan[key] for key in ("name", "benchmark", "data_dir", "order", "method", "seed")}
    Run(dir=folder, model=first.base_model, model_args=first.model_args, stages=[], **described).save()


def train_plan(plan: dict[str, Any], shared: tuple[Any, Any] | None, done: int, total: int) -> tuple[Any, int]:
    """Train what is missing of one plan; returns the base model for the next plan and the count of stages done."""
    from swift_cl.training.sft import CLSft

    previous: Stage | None = None
    for entry in plan["stages"]:
        done += 1
        folder = Path(entry["dir"])
        label = f"[{done}/{total}] {plan['method']}: stage {entry['task']}"
        stage = finished(folder, previous)
        if stage is not None:
            say(f"{label} is finished already")
            previous = stage
            _record(folder.parent, stage)
            continue
        say(f"{label}: training")
        if LOGGING_DIR is None:
            # ms-swift sets it to the folder of a stage, once a process; the next stage would log there as well.
            os.environ.pop(LOGGING_DIR_NAME, None)
        started = time.time()
        argv = entry["argv"] + (["--cl_previous", str(previous.dir)] if previous else [])
        sft = CLSft(argv, shared)
        sft.main()
        shared = sft.release()
        del sft
        gc.collect()
        previous = load_stage(folder)
        _record(folder.parent, previous)
        say(f"{label}: done in {time.time() - started:.0f} s ({previous.train['steps']} steps)")
    return shared, done


def _record(folder: Path, stage: Stage) -> None:
    # After a run's first stage, not at the end of all: what is finished can be evaluated while the rest is trained.
    if stage.index == 0 and distributed.world()[0] == 0:
        record(folder, stage)


def main(run_dirs: list[str]) -> None:
    """Train every plan; `run_dirs` hold their plan.json."""
    plans = [read_json(Path(folder) / PLAN_FILE) for folder in run_dirs]
    total = sum(len(plan["stages"]) for plan in plans)
    shared: tuple[Any, Any] | None = None
    model: str | None = None
    done = 0
    for plan in plans:
        shared, done = train_plan(plan, shared if plan["model"] == model else None, done, total)
        model = plan["model"]
