"""The run file of `swift-cl run`: what to train, in which order, with which settings."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from swift_cl.errors import UserError
from swift_cl.stream import catalogue
from swift_cl.stream.benchmark import Benchmark, load_benchmark, read_yaml
from swift_cl.stream.validation import explain
from swift_cl.training.flags import TRUE

Mode = Literal["train_only", "eval_only", "train_then_eval", "full_workflow"]


class RunConfig(BaseModel):
    """What to train and evaluate. Unknown keys are errors. Relative paths are relative to the file.

    Attributes:
        name: the run's name in reports; default: benchmark and method.
        benchmark: benchmark file or folder, or the name of one of `swift-cl ls benchmarks`.
        data_dir: where the data files are, if not beside the benchmark file.
        model: local folder or hub id of the base model.
        order: name of an order of the benchmark, or several.
        method: a method, or several.
        seed: a seed, or several. Each combination of method, order and seed is a run of its own.
        output_dir: one folder a run is made in it.
        mode: which parts to do; `--mode` wins.
        train: any flag of `swift-cl sft`, without dashes.
        method_settings: flags that only one method gets, by method name.
        eval: flags of `swift-cl eval`, without dashes.
    """

    model_config = ConfigDict(extra="forbid")
    name: str | None = None
    benchmark: str
    data_dir: str | None = None
    order: str | list[str] | None = None
    method: str | list[str] = "seq"
    model: str
    output_dir: str
    seed: int | list[int] = 42
    mode: Mode = "full_workflow"
    train: dict[str, Any] = {}
    method_settings: dict[str, dict[str, Any]] = {}
    eval: dict[str, Any] = {}

    @property
    def methods(self) -> list[str]:
        """The methods to run, one after the other."""
        return [self.method] if isinstance(self.method, str) else self.method

    @property
    def orders(self) -> list[str | None]:
        """The orders to run; None for the benchmark's default."""
        return list(self.order) if isinstance(self.order, list) else [self.order]

    @property
    def seeds(self) -> list[int]:
        """The seeds to run."""
        return self.seed if isinstance(self.seed, list) else [self.seed]

    @property
    def streaming(self) -> bool:
        """Whether the training rows are streamed (`train.streaming`)."""
        return str(self.train.get("streaming", False)).lower() in TRUE

    def singles(self) -> list["RunConfig"]:
        """This configuration for each method, order and seed alone, in the order in which they run."""
        return [
            self.model_copy(update={"method": method, "order": order, "seed": seed})
            for method in self.methods
            for order in self.orders
            for seed in self.seeds
        ]


def set_key(values: dict[str, Any], assignment: str) -> None:
    """Apply one `--set a.b=value`; the value is read as YAML."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"--set {assignment!r} is not of the form key=value, e.g. train.learning_rate=1e-3")
    target = values
    *path, last = key.split(".")
    for part in path:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {assignment!r}: {part!r} is not a group of settings")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        target[last] = text


def _relative_to(base: Path, text: str) -> str:
    """A path of the file, made absolute; a hub id such as Qwen/Qwen2.5-7B stays as it is."""
    path = Path(text).expanduser()
    if path.is_absolute():
        return str(path)
    candidate = (base / path).resolve()
    return str(candidate) if candidate.exists() or text.startswith(".") else text


def load_config(path: Path, assignments: list[str]) -> tuple[RunConfig, Benchmark]:
    """Read a run file (or a folder's `run.yaml`) and the benchmark that it names.

    Raises:
        UserError: an unknown key, a wrong value, or a missing benchmark, named in one line.
    """
    if path.is_dir():
        path = path / "run.yaml"
    values = read_yaml(path)
    if "tasks" in values and "benchmark" not in values:
        raise UserError(
            f"{path}: this is a benchmark file; `swift-cl run` takes a run file with `benchmark: {path.name}`"
        )
    for assignment in assignments:
        set_key(values, assignment)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain(path, error, RunConfig, values) from None
    base = path.parent.resolve()
    config.benchmark = str(catalogue.find(Path(config.benchmark).expanduser(), base).resolve())
    config.model = _relative_to(base, config.model)
    config.output_dir = str((base / Path(config.output_dir).expanduser()).resolve())
    if config.data_dir is not None:
        config.data_dir = str((base / Path(config.data_dir).expanduser()).resolve())
    benchmark = load_benchmark(Path(config.benchmark), Path(config.data_dir) if config.data_dir else None)
    if catalogue.holds(Path(config.benchmark)):
        config.data_dir = str(benchmark.root)  # recorded, so that a later evaluation finds it from anywhere
    return config, benchmark
