"""What a run will do, as pure data: nothing here starts, writes or downloads anything."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.io import read_json
from swift_cl.methods.registry import get_method, methods
from swift_cl.stages import stage_dir_name
from swift_cl.stream.benchmark import Benchmark, Task
from swift_cl.stream.benchmark_file import CLASSIFICATION
from swift_cl.stream.disk import check_on_disk
from swift_cl.stream.labels import labels_of
from swift_cl.training.flags import check_method_flags, flag_values
from swift_cl.training.preflight import check_model
from swift_cl.workflow.config import RunConfig

PLAN_FILE = "plan.json"
PLAN_SCHEMA = 1


@dataclass(frozen=True)
class StagePlan:
    """One stage: the flags of its `swift-cl sft`, without --cl_previous, which is the stage before."""

    task: str
    dir: str
    argv: list[str]
    system: str | None = None


@dataclass(frozen=True)
class RunPlan:
    """One method over one order."""

    name: str
    run_dir: str
    benchmark: str
    data_dir: str | None
    method: str
    model: str
    order: list[str]
    seed: int
    stages: list[StagePlan]

    def save(self) -> None:
        """Write `plan.json` into the run folder."""
        from swift_cl.io import write_json

        write_json(Path(self.run_dir) / PLAN_FILE, {"schema": PLAN_SCHEMA, **asdict(self)})


def flags(values: dict[str, Any]) -> list[str]:
    """A mapping as command-line flags."""
    argv: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        argv.append(f"--{key}")
        if isinstance(value, (list, tuple)):
            argv += [str(item) for item in value]
        elif isinstance(value, bool):
            argv.append(str(value).lower())
        elif isinstance(value, dict):
            argv.append(json.dumps(value, ensure_ascii=False))
        else:
            argv.append(str(value))
    return argv


# Set by the chain itself; a run file that sets them would break it.
RESERVED = (
    "model", "dataset", "output_dir", "cl_method", "cl_task", "cl_previous", "cl_resume", "add_version", "system",
    "adapters", "seed",
)  # fmt: skip


def make_plans(config: RunConfig, benchmark: Benchmark) -> list[RunPlan]:
    """One plan for each method, order and seed.

    Raises:
        UserError: unknown method, order or setting, or a missing model or data file.
    """
    groups = {"train": config.train}
    for method, values in config.method_settings.items():
        get_method(method)  # a misspelt name would be ignored otherwise
        groups[f"method_settings.{method}"] = values
    for group, values in groups.items():
        for key in values:
            if key.replace("-", "_") in RESERVED:
                raise UserError(f"{group}.{key} cannot be set: the chain sets it from the benchmark and the run file")
    for key, several in (("method", config.methods), ("order", config.orders), ("seed", config.seeds)):
        if not several or len(set(several)) != len(several):
            raise UserError(f"{key} is {several}, expected one or several different ones")
    check_model(config.model)
    if config.streaming:
        check_streaming(config)
    return [_plan(single, benchmark, run_folder_name(config, single)) for single in config.singles()]


def check_streaming(config: RunConfig) -> None:
    """Refuse to stream for a method that needs all rows, and without an end."""
    able = [name for name, method in methods().items() if method.support.streaming]
    for name in config.methods:
        if name not in able:
            raise UserError(f"train.streaming does not work with method {name!r}, allowed: {', '.join(able)}")
    if not config.train.get("max_steps"):
        raise UserError("train.streaming needs train.max_steps: the number of rows is not known")


def run_folder_name(config: RunConfig, single: RunConfig) -> str:
    """Folder of one run: its method; with several orders or seeds in one call also the run's own, `ewc-order1-seed7`.

    Args:
        config: the whole call.
        single: the same with the run's one method, order and seed.
    """
    order = [str(single.order)] if len(config.orders) > 1 else []
    seed = [f"seed{single.seed}"] if len(config.seeds) > 1 else []
    return "-".join([str(single.method), *order, *seed])


def _plan(config: RunConfig, benchmark: Benchmark, folder_name: str) -> RunPlan:
    """The plan of one method, order and seed."""
    method, (order,), (seed,) = str(config.method), config.orders, config.seeds
    tasks, run_dir = benchmark.order(order), Path(config.output_dir) / folder_name
    stages = []
    classes = class_flags(method, benchmark, tasks)
    for index, task in enumerate(tasks):
        folder = run_dir / stage_dir_name(index, task.name)
        values = {
            "model": config.model,
            "dataset": str(training_file(task, run_dir, config.streaming)),
            "output_dir": str(folder),
            "add_version": False,
            "seed": seed,
            "system": task.system,
            "cl_method": method,
            "cl_task": task.name,
            "cl_resume": True,
            "check_model": False,
            "report_to": "none",
            **classes,
            **config.train,
            **config.method_settings.get(method, {}),
        }
        argv = flags(values)
        check_method_flags(argv)
        stages.append(StagePlan(task.name, str(folder), argv, task.system))
    name = config.name or f"{benchmark.name}_{method}"
    return RunPlan(
        name + folder_name.removeprefix(method),
        str(run_dir),
        config.benchmark,
        config.data_dir,
        method,
        config.model,
        [task.name for task in tasks],
        seed,
        stages,
    )


def class_flags(method: str, benchmark: Benchmark, tasks: Sequence[Task]) -> dict[str, Any]:
    """The flags that tell a method its classes; none for a method that learns texts.

    Raises:
        UserError: the benchmark is no classification, or its data is missing or wrong.
    """
    if not get_method(method).classifies:
        return {}
    check_on_disk(benchmark, tasks)
    labels = labels_of(benchmark, tasks, [task.test_rows() for task in tasks])
    if not labels:
        raise UserError(
            f"{benchmark.path}: method {method!r} learns classes, which needs scenario: {' or '.join(CLASSIFICATION)}"
        )
    scenario = "til" if benchmark.scenario == "task_incremental" else "cil"
    by_task = {task.name: list(own) for task, own in zip(tasks, labels, strict=True)}
    return {f"{method}_labels": by_task, f"{method}_scenario": scenario}


def training_file(task: Task, run_dir: Path, streaming: bool = False) -> Path:
    """The file that ms-swift reads: the task's own one (which must do for streaming), or the run's conversion of what
    ms-swift reads otherwise."""
    return task.train if streaming or task.is_native else run_dir / "data" / f"{task.name}.train.jsonl"


def check_against_existing(plan: RunPlan) -> None:
    """Refuse to continue a run that was made with other settings: its stages would not belong together.

    How the work is spread over processes (`SPREAD`) may change: what is computed does not depend on it, and a stage
    that was stopped checks for itself that its steps keep their rows.
    """
    path = Path(plan.run_dir) / PLAN_FILE
    if not path.is_file():
        return
    old = read_json(path)
    if not isinstance(old, dict):
        raise UserError(f"{path}: not a plan of a run")
    if not any(Path(plan.run_dir).glob("stage_*")):
        return  # nothing was trained with the old settings
    new = json.loads(json.dumps({"schema": PLAN_SCHEMA, **asdict(plan)}))
    difference = _difference(old, new)
    if difference is None:
        return
    raise UserError(
        f"{plan.run_dir}: was made with other settings ({difference}); "
        "use another output_dir, or --overwrite to start it anew"
    )


SPREAD = ("per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed", "fsdp", "ddp_backend")
"""Flags that say how a training is spread over processes."""


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first setting in which two plans differ; None where they belong to one run."""
    for key in ("schema", "benchmark", "data_dir", "method", "model", "order", "seed", "name", "run_dir"):
        if old.get(key) != new[key]:
            return f"{key} was {old.get(key)!r}, is {new[key]!r}"
    for before, after in zip(old.get("stages", []), new["stages"], strict=False):
        was, now = flag_values(before["argv"]), flag_values(after["argv"])
        for flag in sorted((was.keys() | now.keys()) - set(SPREAD)):
            if was.get(flag) != now.get(flag):
                return f"--{flag} was {' '.join(was.get(flag, ['not set']))}, is {' '.join(now.get(flag, ['not set']))}"
    if len(old.get("stages", [])) != len(new["stages"]):
        return f"{len(old.get('stages', []))} stages were planned, are {len(new['stages'])}"
    return None
