"""A benchmark folder of EasyCL as it is: benchmark_info.json has the orders, dataset_info.json the data files.

benchmark_info.json   {"LFPT5": {"description": ..., "orders": {"order1": ["dbpedia", "amazon", ...]}}}
dataset_info.json     {"agnews": {"file_name": "agnews/agnews_train.json", "formatting": "alpaca", "split": "train"},
                       "agnews_test": {"file_name": "agnews/agnews_test.json", "split": "test"}}
"""

import os
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError, did_you_mean
from swift_cl.stream.benchmark import Benchmark, Task, check_orders
from swift_cl.stream.files import json_object
from swift_cl.stream.readers import parse_options

FORMATS = ("alpaca", "sharegpt")
READ = ("columns", "tags", "ranking")
# What changes nothing of what is read from a local file.
IGNORED = ("file_name", "file_sha1", "formatting", "split", "description")


def load_folder(folder: Path, data_dir: Path | None = None) -> Benchmark:
    """Read the folder; data files are below `data_dir`, by default below the folder itself.

    Raises:
        UserError: a file is malformed, a task of an order has no train or test data, or a setting is not supported.
    """
    path = folder / "benchmark_info.json"
    name, info = _only_benchmark(path, folder.name)
    orders = info.get("orders")
    if not isinstance(orders, dict) or not all(
        isinstance(order, list) and all(isinstance(task, str) for task in order) for order in orders.values()
    ):
        raise UserError(f"{path}: {name!r} has no 'orders' of the form {{name: [task, ...]}}")
    if not orders:
        raise UserError(f"{path}: {name!r} has no order")
    root = data_dir or folder.resolve()
    datasets = json_object(folder / "dataset_info.json")
    names = dict.fromkeys(task for order in orders.values() for task in order)
    tasks = {task: task_of(folder / "dataset_info.json", root, task, datasets) for task in names}
    named_orders = {order: tuple(names_of) for order, names_of in orders.items()}
    check_orders(path, named_orders, tasks)
    description = str(info.get("description", ""))
    return Benchmark(name, path.parent, tasks, named_orders, ("exact_match",), root=root, description=description)


def _only_benchmark(path: Path, folder: str) -> tuple[str, dict[str, Any]]:
    """The benchmark of the file; of several the one that is named as the folder."""
    benchmarks = json_object(path)
    name = folder if folder in benchmarks or len(benchmarks) != 1 else next(iter(benchmarks))
    if not isinstance(benchmarks.get(name), dict):
        raise UserError(f"{path}: no benchmark {name!r}, found: {', '.join(benchmarks) or 'none'}")
    return name, benchmarks[name]


def _entry(path: Path, datasets: dict[str, Any], task: str, split: str) -> str | None:
    """The key of a task's data: `<task>_<split>`, or `<task>` where its own split is this one (train if unnamed)."""
    own = datasets.get(task, {})
    if not isinstance(own, dict):
        raise UserError(f"{path}: {task!r} is {type(own).__name__}, expected an object")
    if task in datasets and split == "train" and own.get("split", "train") == "train":
        return task
    if f"{task}_{split}" in datasets:
        return f"{task}_{split}"
    return task if own.get("split") == split else None


def task_of(path: Path, root: Path, task: str, datasets: dict[str, Any]) -> Task:
    """A task whose train and test data dataset_info.json (`path`) lists; the data files are below `root`."""
    formats, files, options = [], [], []
    for split in ("train", "test"):
        key = _entry(path, datasets, task, split)
        if key is None:
            hint = did_you_mean(task, list(datasets))
            raise UserError(f"{path}: no {split} data for task {task!r}: neither {task}_{split} nor {task}{hint}")
        entry = datasets[key]
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {key!r} is {type(entry).__name__}, expected an object")
        file_format, file = entry.get("formatting", "alpaca"), _data_file(path, root, key, entry)
        if file_format not in FORMATS:
            raise UserError(f"{path}: {key!r} has formatting {file_format!r}, allowed: {', '.join(FORMATS)}")
        settings = {name: entry[name] for name in READ if name in entry}
        settings["media_dir"] = os.path.relpath(root, file.parent)
        try:
            parse_options(file_format, settings)
        except UserError as error:
            raise UserError(f"{path}: {key!r}: {error}") from None
        formats.append(file_format)
        files.append(file)
        options.append(settings)
    if formats[0] != formats[1]:
        raise UserError(f"{path}: task {task!r} has training data in {formats[0]} and test data in {formats[1]}")
    return Task(task, files[0], files[1], formats[0], train_options=options[0], test_options=options[1])


def _data_file(path: Path, root: Path, key: str, entry: dict[str, Any]) -> Path:
    for setting in entry:
        if setting not in (*READ, *IGNORED):
            raise UserError(
                f"{path}: {key!r} has {setting!r}, which is not supported; a data set of a hub can be named in a "
                "benchmark file with `format: swift`, a part of the rows with `train_limit`"
            )
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: {key!r} has no 'file_name'")
    if Path(name).is_absolute() or Path(os.path.normpath(name)).parts[0] == "..":
        raise UserError(f"{path}: {key!r} has file_name {name!r}, which lies outside the folder")
    return root / os.path.normpath(name)
