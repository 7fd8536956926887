"""A benchmark file: which tasks there are, in which orders they are learned, and how answers are scored."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from swift_cl.errors import UserError, did_you_mean
from swift_cl.io import read_text
from swift_cl.stream import catalogue
from swift_cl.stream.benchmark_file import SCENARIO_VIEWS, BenchmarkModel, ProbeModel, ViewModel, check_classification
from swift_cl.stream.files import mentions_images, starts_with_mark
from swift_cl.stream.images import check_askable
from swift_cl.stream.readers import formats, locate, parse_options, read_rows
from swift_cl.stream.readers.messages import check_head
from swift_cl.stream.rows import Row
from swift_cl.stream.validation import explain

STREAMED_HEAD = 1000
"""Rows of a streamed file that are checked before the start."""

ScorerOptions = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        name: also the name of its column, and part of its stage's folder name.
        train, test: data files.
        file_format: the reader, see `swift_cl.stream.readers`.
        system: the system prompt of the stage that learns this task; None for the template's default.
        scorers: scorer names for this task, or empty where the benchmark's apply.
        scorer_options: settings by scorer name, which win over the benchmark's key by key.
        train_limit, test_limit: only the first so many rows.
        train_options, test_options: settings of the reader.
        generation: settings that win over the benchmark's, key by key.
        labels: the declared labels or the file that has them, see `swift_cl.stream.labels`; empty where none are.
    """

    name: str
    train: Path
    test: Path
    file_format: str = "messages"
    system: str | None = None
    scorers: tuple[str, ...] = ()
    train_limit: int | None = None
    test_limit: int | None = None
    scorer_options: ScorerOptions = field(default_factory=dict)
    train_options: Mapping[str, Any] = field(default_factory=dict)
    test_options: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | Path = ()

    @property
    def is_native(self) -> bool:
        """Whether ms-swift reads the training file as it is meant: plain dialogues, all rows, no byte order mark, and
        no images (whose names ms-swift takes from the working directory, not from the file's folder)."""
        whole = self.file_format == "messages" and self.train_limit is None
        return whole and not starts_with_mark(self.train) and not mentions_images(self.train)

    def train_rows(self) -> list[Row]:
        """The rows to learn from."""
        return read_rows(self.train, self.file_format, self.train_limit, self.train_options)

    def check_streamed(self) -> None:
        """Check what can be checked of training rows that are streamed: the file's kind and its first rows.

        Raises:
            UserError: the task's rows cannot be streamed, or one of the first is wrong.
        """
        if self.file_format != "messages" or self.train.suffix != ".jsonl" or self.train_limit is not None:
            raise UserError(
                f"task {self.name!r}: {self.train} cannot be streamed, only JSON lines (.jsonl) of format messages "
                "without train_limit can"
            )
        check_head(self.train, STREAMED_HEAD)

    def test_rows(self) -> list[Row]:
        """The rows to ask."""
        return check_askable(self.test, read_rows(self.test, self.file_format, self.test_limit, self.test_options))


@dataclass(frozen=True)
class Benchmark:
    """Tasks, orders, scorers and generation settings, as read from a benchmark file.

    Attributes:
        scorer_options: settings by scorer name; the scorers themselves check them (`swift_cl.evaluation.scorers`).
        views: further questions about the tasks, by name: for each task a task `<task>@<view>` that has them.
        probes: tasks that are asked after every stage and never learned.
        scenario: which metrics of views are meant, see `swift_cl.evaluation.scenarios`.
        decoding: `free`, or `constrained` to the labels that are visible in the scenario.
        root: the folder that the data files' names start from.
        data_source: where the data is to be had and how to lay it out, for people.
    """

    name: str
    path: Path
    tasks: Mapping[str, Task]
    orders: Mapping[str, tuple[str, ...]]
    scorers: tuple[str, ...]
    generation: Mapping[str, Any] = field(default_factory=dict)
    scorer_options: ScorerOptions = field(default_factory=dict)
    root: Path = Path()
    description: str = ""
    data_source: str = ""
    views: Mapping[str, Mapping[str, Task]] = field(default_factory=dict)
    probes: tuple[Task, ...] = ()
    scenario: str | None = None
    decoding: str = "free"

    def also_asked(self, tasks: Iterable[Task]) -> list[Task]:
        """What is asked beside the tasks themselves: their views, and the probes."""
        names = [task.name for task in tasks]
        return [*(view[name] for view in self.views.values() for name in names), *self.probes]

    def order(self, name: str | None = None) -> list[Task]:
        """The tasks of an order; without a name, of `default`, or else of the first one in the file."""
        if name is None:
            name = "default" if "default" in self.orders else next(iter(self.orders))
        if name not in self.orders:
            hint = did_you_mean(name, list(self.orders))
            raise UserError(f"{self.path}: order {name!r} is unknown, allowed: {', '.join(self.orders)}{hint}")
        return [self.tasks[task] for task in self.orders[name]]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; a missing or malformed file is a `UserError`."""
    if not path.is_file():
        raise UserError(f"{path}: file not found")
    try:
        value = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping at the top, found {type(value).__name__}")
    return value


def load_benchmark(path: Path, data_dir: Path | None = None) -> Benchmark:
    """Read a benchmark.

    Args:
        path: a YAML file; a folder that holds `benchmark.yaml`, or EasyCL's benchmark_info.json and dataset_info.json;
            or, where there is no such file, the name of a benchmark of the catalogue.
        data_dir: where the data files are; default: `data_dir` in the file, else the file's own folder; for a
            benchmark of the catalogue see `catalogue.data_folder`.

    Raises:
        UserError: an unknown key, format or task, a task named twice, or a task missing from an order's data.
    """
    path = catalogue.find(path)
    if path.is_dir() and not (path / "benchmark.yaml").is_file() and (path / "benchmark_info.json").is_file():
        from swift_cl.stream.easycl import load_folder

        return load_folder(path, data_dir)
    if path.is_dir():
        path = path / "benchmark.yaml"
    values = read_yaml(path)
    try:
        model = BenchmarkModel.model_validate(values)
    except ValidationError as error:
        raise explain(path, error, BenchmarkModel, values) from None
    if data_dir is None and catalogue.holds(path):
        data_dir = catalogue.data_folder(model.name)
    root = data_dir or (path.parent / (model.data_dir or ".")).resolve()
    tasks: dict[str, Task] = {}
    for entry in model.tasks:
        file_format = entry.format or model.format
        if file_format not in formats():
            hint = did_you_mean(file_format, formats())
            raise UserError(f"{path}: format {file_format!r} is unknown, allowed: {', '.join(formats())}{hint}")
        if entry.name in tasks:
            raise UserError(f"{path}: task {entry.name!r} is defined twice")
        shared = {**model.options, **entry.options}
        train_options = {**shared, **model.train_options, **entry.train_options}
        test_options = {**shared, **model.test_options, **entry.test_options}
        for options in (train_options, test_options):
            check_options(path, f"task {entry.name!r}", file_format, options)
        tasks[entry.name] = Task(
            entry.name,
            locate(root, entry.train, file_format),
            locate(root, entry.test, file_format),
            file_format,
            entry.system,
            tuple(entry.scorers),
            entry.train_limit,
            entry.test_limit,
            scorer_options=entry.scorer_options,
            generation=entry.generation.settings(),
            train_options=train_options,
            test_options=test_options,
            labels=root / entry.labels if isinstance(entry.labels, str) else tuple(entry.labels or ()),
        )
    check_classification(path, model)
    views = {
        view: {
            entry.name: _view(path, root, tasks[entry.name], view, model.views, entry.views) for entry in model.tasks
        }
        for view in dict.fromkeys([*model.views, *(view for entry in model.tasks for view in entry.views)])
    }
    probes = tuple(_probe(path, root, model, entry) for entry in model.probes)
    names = [*tasks, *(probe.name for probe in probes)]
    if len(set(names)) != len(names):
        raise UserError(f"{path}: probes: a probe has the name of a task or of another probe")
    missing = [view for view in SCENARIO_VIEWS.get(model.scenario or "", ()) if view not in views]
    if missing:
        raise UserError(f"{path}: scenario {model.scenario} needs the view {missing[0]!r}, found: {list(views)}")
    orders = {name: tuple(order) for name, order in model.orders.items()} or {"default": tuple(tasks)}
    check_orders(path, orders, tasks)
    return Benchmark(
        model.name,
        path,
        tasks,
        orders,
        tuple(model.scorers),
        model.generation.settings(),
        model.scorer_options,
        root,
        " ".join(model.description.split()),
        " ".join(model.data_source.split()),
        views,
        probes,
        model.scenario,
        model.decoding,
    )


def _view(
    path: Path, root: Path, task: Task, name: str, shared: Mapping[str, ViewModel], own: Mapping[str, ViewModel]
) -> Task:
    """A task's further questions, as a task."""
    entries = [entries[name] for entries in (shared, own) if name in entries]
    if not entries:
        raise UserError(f"{path}: task {task.name!r} has no view {name!r}, which other tasks have")
    file = next((entry.test for entry in reversed(entries) if entry.test), None)
    options = dict(task.test_options)
    for entry in entries:
        options |= entry.test_options
    check_options(path, f"task {task.name!r}, view {name!r}", task.file_format, options)
    test = task.test if file is None else locate(root, file, task.file_format)
    return replace(task, name=f"{task.name}@{name}", test=test, test_options=options)


def _probe(path: Path, root: Path, model: BenchmarkModel, entry: ProbeModel) -> Task:
    """A probe as a task whose training rows nobody reads."""
    file_format = entry.format or model.format
    options = (
        {**model.options, **model.test_options, **entry.test_options}
        if file_format == model.format
        else {**entry.test_options}
    )
    check_options(path, f"probe {entry.name!r}", file_format, options)
    file = locate(root, entry.test, file_format)
    return Task(
        entry.name,
        file,
        file,
        file_format,
        entry.system,
        tuple(entry.scorers),
        test_limit=entry.test_limit,
        scorer_options=entry.scorer_options,
        train_options=options,
        test_options=options,
        generation=entry.generation.settings(),
    )


def check_options(path: Path, where: str, file_format: str, options: Mapping[str, Any]) -> None:
    """Refuse settings that a format does not have."""
    try:
        parse_options(file_format, options)
    except UserError as error:
        raise UserError(f"{path}: {where}: {error}") from None


def check_orders(path: Path, orders: Mapping[str, tuple[str, ...]], tasks: Mapping[str, Task]) -> None:
    """Refuse an order that names an unknown task, a task twice, or none."""
    for name, order in orders.items():
        unknown = [task for task in order if task not in tasks]
        if not order:
            raise UserError(f"{path}: order {name!r} names no task, allowed: {', '.join(tasks)}")
        if unknown:
            raise UserError(f"{path}: order {name!r} names unknown tasks {unknown}, allowed: {', '.join(tasks)}")
        if len(set(order)) != len(order):
            raise UserError(f"{path}: order {name!r} names a task twice")
