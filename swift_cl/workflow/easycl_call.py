"""EasyCL's call form: `--train_params A.yaml --eval_params B.yaml`, turned into our run file and benchmark file.

The two files stay as they are. What they say is written as `run.yaml` and `benchmark.yaml` into the output folder, and
runs from there. A key that we have no counterpart for is refused; one that EasyCL needs and we do not is told.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from swift_cl.errors import UserError, did_you_mean
from swift_cl.io import write_text
from swift_cl.methods.base import flags_of
from swift_cl.methods.registry import get_method
from swift_cl.stream.benchmark import Task, read_yaml
from swift_cl.stream.easycl import task_of
from swift_cl.stream.files import json_object
from swift_cl.workflow.easycl_keys import (
    CHAIN_SETS,
    EVAL_KEYS,
    METHOD_KEYS,
    METHODS,
    NO_EFFECT,
    OWN_EVAL,
    OWN_TRAIN,
    REQUIRED_VALUE,
    TEMPLATES,
    TRAIN_KEYS,
)

RUN_FILE, BENCHMARK_FILE = "run.yaml", "benchmark.yaml"
HEADER = "# Made by `swift-cl run --train_params --eval_params` from two files of EasyCL.\n"


@dataclass
class EasyclCall:
    """What the two files say, in our form.

    Attributes:
        run, benchmark: contents of our two files; `benchmark` is None for a benchmark folder, which is used as it is.
        notes: what is done otherwise than in EasyCL, one line each.
    """

    run: dict[str, Any]
    benchmark: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """Write both files; returns the run file."""
        run = dict(self.run)
        if self.benchmark is not None:
            write_text(folder / BENCHMARK_FILE, HEADER + _yaml(self.benchmark))
            run["benchmark"] = BENCHMARK_FILE
        write_text(folder / RUN_FILE, HEADER + _yaml(run))
        return folder / RUN_FILE


def _yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def convert(train_params: Path, eval_params: Path, benchmark_dir: Path | None = None) -> EasyclCall:
    """Read the two files.

    Args:
        benchmark_dir: a benchmark folder of EasyCL; without it the tasks are those of `dataset` in `dataset_dir`.

    Raises:
        UserError: a file is missing or malformed, or a key or value has no counterpart here.
    """
    train, evaluation = read_yaml(train_params), read_yaml(eval_params)
    call = EasyclCall({})
    for key in ("model_name_or_path", "output_dir"):
        if not train.get(key):
            raise UserError(f"{train_params}: {key} is missing")
    method = _method(train_params, train)
    call.run = {
        "benchmark": str(benchmark_dir.resolve()) if benchmark_dir else BENCHMARK_FILE,
        "model": _model(train["model_name_or_path"]),
        "output_dir": str(Path(train["output_dir"]).expanduser().resolve()),
        "method": method,
        "seed": train.get("seed", 42),
        "train": {},
        "method_settings": {},
        "eval": {},
    }
    settings = call.run["method_settings"].setdefault(method, {})
    for key, value in train.items():
        _train_key(train_params, key, value, method, call.run["train"], settings, call.notes)
    for key, value in evaluation.items():
        _eval_key(eval_params, key, value, train, call.run["eval"], call.notes)
    if benchmark_dir is None:
        call.benchmark = _benchmark(train_params, train)
        _check_tasks(eval_params, evaluation, list(call.benchmark["orders"]["default"]))
    elif train.get("max_samples") is not None:
        raise UserError(f"{train_params}: max_samples does not go with --benchmark_dir, whose tasks are taken whole")
    return call


def _model(name: str) -> str:
    """A local folder as an absolute path (EasyCL's are relative to the working directory); a hub id as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() or name.startswith((".", "/", "~")) else name


def _method(path: Path, train: Mapping[str, Any]) -> str:
    chosen = [name for name in METHODS if train.get(f"use_{name}") is True]
    if len(chosen) > 1:
        raise UserError(f"{path}: {' and '.join(f'use_{name}' for name in chosen)} are true, expected one method")
    name = METHODS[chosen[0]] if chosen else "seq"
    get_method(name)
    return name


def _train_key(
    path: Path, key: str, value: Any, method: str, train: dict[str, Any], settings: dict[str, Any], notes: list[str]
) -> None:
    """Put one key of the training file where it belongs."""
    own = [flag for flag, _ in flags_of(get_method(method))]
    if key in OWN_TRAIN or (key.startswith("use_") and key.removeprefix("use_") in METHODS) or value is None:
        return
    if key in REQUIRED_VALUE:
        if value != REQUIRED_VALUE[key]:
            raise UserError(f"{path}: {key} is {value!r}, only {REQUIRED_VALUE[key]!r} can be run")
    elif key in CHAIN_SETS or key in NO_EFFECT:
        notes.append(f"{key} is not needed: {CHAIN_SETS.get(key) or NO_EFFECT[key]}")
    elif key == "template":
        train["template"] = _template(path, value)
    elif key == "lora_target":
        names = [name.strip() for name in str(value).split(",")]
        train["target_modules"] = "all-linear" if names == ["all"] else names
    elif key in TRAIN_KEYS:
        train[TRAIN_KEYS[key]] = value
    elif key in METHOD_KEYS:
        owner, flag, note = METHOD_KEYS[key]
        if owner != method:
            raise UserError(f"{path}: {key} is a setting of {owner}, but the method is {method}")
        settings[flag] = value
        if note:
            notes.append(f"{key}: {note}")
    elif key in own:
        settings[key] = value
    else:
        raise _unknown(
            path, key, [*TRAIN_KEYS, *REQUIRED_VALUE, *CHAIN_SETS, *NO_EFFECT, *METHOD_KEYS, *OWN_TRAIN, *own]
        )


def _eval_key(
    path: Path, key: str, value: Any, train: Mapping[str, Any], found: dict[str, Any], notes: list[str]
) -> None:
    """Put one key of the evaluation file where it belongs."""
    same = {"model_name_or_path": "model_name_or_path", "template": "template", "task_dir": "dataset_dir"}
    if value is None or key in OWN_EVAL:
        return
    if key in same:
        wanted = train.get(same[key])
        if wanted is not None and value != wanted:
            raise UserError(f"{path}: {key} is {value!r}, but the training file has {same[key]} {wanted!r}")
    elif key in REQUIRED_VALUE:
        if value != REQUIRED_VALUE[key]:
            raise UserError(f"{path}: {key} is {value!r}, only {REQUIRED_VALUE[key]!r} can be run")
    elif key in NO_EFFECT:
        notes.append(f"{key} is not needed: {NO_EFFECT[key]}")
    elif key == "cleval_use_vllm":
        found["infer_backend"] = "vllm" if value else "pt"
    elif key == "save_dir":
        found["output"] = str(Path(value).expanduser().resolve())
    elif key in EVAL_KEYS:
        found[EVAL_KEYS[key]] = value
    else:
        raise _unknown(path, key, [*same, *EVAL_KEYS, *NO_EFFECT, *OWN_EVAL, "cleval_use_vllm", "save_dir"])


def _unknown(path: Path, key: str, known: list[str]) -> UserError:
    return UserError(f"{path}: {key} has no counterpart in swift_cl{did_you_mean(key, known)}")


def _template(path: Path, name: Any) -> str:
    if name not in TEMPLATES:
        raise UserError(
            f"{path}: template {name!r} has no known counterpart in ms-swift, known: {', '.join(TEMPLATES)}; write a "
            "run file with train.template instead (assets/from_other_codebases.md)"
        )
    return TEMPLATES[name]


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value).split(",")
    return [str(name).strip() for name in names if str(name).strip()]


def _benchmark(path: Path, train: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks of `dataset`, found in the dataset_info.json of `dataset_dir`."""
    names = _names(train.get("dataset") or "")
    if not names:
        raise UserError(f"{path}: dataset is missing: the tasks in their order, or --benchmark_dir")
    folder = Path(train.get("dataset_dir", "data")).expanduser().resolve()
    info = folder / "dataset_info.json"
    datasets = json_object(info)
    tasks = [_entry(task_of(info, folder, name, datasets), train.get("max_samples")) for name in names]
    return {"name": "easycl", "tasks": tasks, "orders": {"default": names}, "scorers": ["exact_match"]}


def _entry(task: Task, limit: int | None) -> dict[str, Any]:
    """A task as a benchmark file has it."""
    entry = {"name": task.name, "train": str(task.train), "test": str(task.test), "format": task.file_format,
             "train_limit": limit, "train_options": dict(task.train_options),
             "test_options": dict(task.test_options)}  # fmt: skip
    return {key: value for key, value in entry.items() if value not in (None, {})}


def _check_tasks(path: Path, evaluation: Mapping[str, Any], order: list[str]) -> None:
    asked = evaluation.get("cl_tasks")
    if asked is not None and _names(asked) != order:
        raise UserError(f"{path}: cl_tasks is {_names(asked)}, but the training file learns {order}")


def load_call(call: EasyclCall, load: Callable[[Path], Any], preview: bool) -> Any:
    """What `load` makes of the written run file; for a preview it is written to a folder that goes away."""
    import tempfile

    if not preview:
        return load(call.write(Path(call.run["output_dir"])))
    with tempfile.TemporaryDirectory() as folder:
        return load(call.write(Path(folder)))
