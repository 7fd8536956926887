"""A model, two tasks with data, a benchmark with two orders, and a run file; training is pretended."""

import json
from pathlib import Path
from typing import Any

import yaml

from swift_cl.stages import load_stage
from tests.support.stages import make_model, make_stage

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def make_folder(folder: Path) -> Path:
    """`base` (model), `data` (benchmark `two`: tasks a and b, orders default and back) and `run.yaml`."""
    make_model(folder / "base")
    data = folder / "data"
    data.mkdir()
    for name in ("a-train", "a-test", "b-train", "b-test"):
        (data / f"{name}.json").write_text(json.dumps([ROW, ROW, ROW]))
    tasks = [{"name": n, "train": f"{n}-train.json", "test": f"{n}-test.json", "system": f"News of {n}."} for n in "ab"]
    benchmark = {"name": "two", "tasks": tasks, "orders": {"default": ["a", "b"], "back": ["b", "a"]}}
    (data / "benchmark.yaml").write_text(yaml.safe_dump(benchmark))
    write_config(folder)
    return folder


def write_config(folder: Path, **changes: Any) -> Path:
    """`run.yaml` with some keys changed; None leaves a key out."""
    values: dict[str, Any] = {
        "benchmark": "data", "model": "base", "output_dir": "runs", "train": {"max_steps": 2}, **changes
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


def finish(plan: Any, seed: int = 0) -> None:
    """Pretend that the training process has trained every stage of a plan that is not there."""
    previous = None
    for number, stage in enumerate(plan.stages):
        path = Path(stage.dir)
        if not path.is_dir():
            make_stage(path, previous, seed + number, task=stage.task, method=plan.method, base_model=plan.model)
        previous = load_stage(path)
