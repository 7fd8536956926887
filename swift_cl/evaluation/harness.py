"""General ability by lm-evaluation-harness: its tasks, asked through the served endpoint, before and after training.

The harness runs as a program of its own for each model (the base and the last stage, or every stage) and speaks to our
server like any other client. What it found is kept in RUN_DIR/harness/<row>.json under a key of everything that shaped
it, so that a second evaluation asks nothing; `harness_results` makes the tables of it. Values are in the harness's own
units (mostly 0 to 1).
"""

import importlib.metadata
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swift_cl.errors import RunFailure, UserError, did_you_mean
from swift_cl.evaluation.metrics import Cell
from swift_cl.evaluation.plan import Grid, Target
from swift_cl.evaluation.scenarios import general_ability
from swift_cl.io import read_json, sha256_json, write_json

HARNESS_DIR, SETTINGS_FILE = "harness", "settings.json"
HARNESS_SCHEMA = 1
STAGES, ENDPOINTS = ("last", "all"), ("chat", "completions")
PACKAGE = "lm_eval"


@dataclass(frozen=True)
class HarnessOptions:
    """What the harness asks.

    Attributes:
        tasks: its tasks, groups or tags.
        limit: only so many rows of a task.
        num_fewshot: examples in front of each question; None for the task's own number.
        include_path: folder of further tasks.
        stages: one of `STAGES`: the base model and the last stage, or every stage.
        endpoint: one of `ENDPOINTS`: chat (tasks that generate), or completions (log-likelihoods as well, where the
            server gives those of a prompt, as vLLM does).
    """

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: Path | None = None
    stages: str = "last"
    endpoint: str = "chat"

    def check(self) -> None:
        """Find out before a server starts what the harness would refuse.

        Raises:
            UserError: it is not installed, or does not know a task.
        """
        if importlib.util.find_spec(PACKAGE) is None:
            raise UserError("--lm_eval needs lm-evaluation-harness: pip install 'swift_cl[harness]'")
        if self.include_path is not None and not self.include_path.is_dir():
            raise UserError(f"--lm_eval_include_path {self.include_path}: no such folder")
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=self.include_path and str(self.include_path))
        for task in self.tasks:
            if not manager.match_tasks([task]):
                hint = did_you_mean(task, manager.all_tasks) or "; see `lm_eval ls tasks`"
                raise UserError(f"--lm_eval {task}: lm-evaluation-harness has no such task{hint}")

    def as_json(self) -> dict[str, Any]:
        """What the key hashes."""
        return {**asdict(self), "include_path": self.include_path and str(self.include_path)}


def rows(grid: Grid, options: HarnessOptions) -> list[Target]:
    """The models that are asked.

    Raises:
        UserError: one of them chooses an adapter for every question, so that no single served name is it.
    """
    stages = [target for target in grid.stages if target is not None]
    found = [grid.base, *(stages if options.stages == "all" else stages[-1:])]
    for target in found:
        if target.choices:
            raise UserError(
                f"--lm_eval asks one served model a stage, but method {grid.run.method!r} of {grid.run.dir} chooses an "
                "adapter for every question; serve it with `swift-cl deploy --route` and run lm_eval on that"
            )
    return found


@dataclass(frozen=True)
class Harness:
    """The harness for some runs.

    Attributes:
        backend: what generates, as in the answers' keys.
        bases: identity of each run's base model, by folder.
    """

    options: HarnessOptions
    backend: str
    bases: Mapping[Path, str]

    def key(self, grid: Grid, target: Target) -> str:
        """Everything that shapes what the harness finds for a model."""
        version = importlib.metadata.version(PACKAGE) if importlib.util.find_spec(PACKAGE) else None
        base = self.bases[grid.run.dir]
        return sha256_json([base, target.weights, self.options.as_json(), self.backend, version])

    def missing(self, targets: Sequence[tuple[Grid, Target]]) -> list[tuple[Grid, Target]]:
        """Those of the models that the harness has not asked under these settings; notes the settings of each run."""
        found = []
        for grid, target in targets:
            if grid.is_part or not any(target is row for row in rows(grid, self.options)):
                continue
            _write_if_new(_folder(grid) / SETTINGS_FILE, {"schema": HARNESS_SCHEMA, **self.options.as_json()})
            if _stored(grid, target, self.key(grid, target)) is None:
                found.append((grid, target))
        return found

    def fill(
        self, url: str, jobs: Sequence[tuple[Grid, Target]], served: Mapping[str, str], notify: Callable[[str], None]
    ) -> None:
        """Ask the models of one server, each once.

        Args:
            served: names at the endpoint by weights.

        Raises:
            RunFailure: the harness failed; its last lines and its command are told.
        """
        done: dict[str, dict[str, Any]] = {}
        for grid, target in jobs:
            key = self.key(grid, target)
            if key not in done:
                log = grid.run.dir / "logs" / "harness.log"
                name = served[target.weights]
                notify(f"lm-evaluation-harness asks {name} ({', '.join(self.options.tasks)}), the log is {log}")
                done[key] = self._run(url, name, grid.run.model, log)
            entry = {
                "schema": HARNESS_SCHEMA,
                "key": key,
                "weights": target.weights,
                "settings": self.options.as_json(),
            }
            write_json(_folder(grid) / f"{target.row}.json", {**entry, **done[key]})

    def command(self, url: str, name: str, tokenizer: str, output: str) -> list[str]:
        """The harness's own command line."""
        options = self.options
        chat = options.endpoint == "chat"
        model = {
            "model": name,
            "base_url": f"{url}/{'chat/completions' if chat else 'completions'}",
            "num_concurrent": 16,
            "tokenized_requests": False,
            **({} if chat else {"tokenizer": tokenizer}),
        }
        found = [sys.executable, "-m", PACKAGE, "run", "--model", f"local-{'chat-' if chat else ''}completions"]
        found += ["--model_args", ",".join(f"{key}={value}" for key, value in model.items())]
        found += ["--tasks", *options.tasks, "--output_path", output, *(["--apply_chat_template"] if chat else [])]
        for flag in ("limit", "num_fewshot", "include_path"):
            value = getattr(options, flag)
            found += [] if value is None else [f"--{flag}", str(value)]
        return found

    def _run(self, url: str, name: str, tokenizer: str, log: Path) -> dict[str, Any]:
        log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            argv = self.command(url, name, tokenizer, folder)
            with log.open("ab") as stream:
                stream.write(f"\n$ {shlex.join(argv)}\n".encode())
                stream.flush()
                code = subprocess.run(argv, stdout=stream, stderr=stream, env=_environment(), check=False).returncode
            files = sorted(Path(folder).rglob("results_*.json"))
            if code or not files:
                said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
                raise RunFailure(
                    f"lm-evaluation-harness failed with exit code {code} for {name}: {' | '.join(said)}; "
                    f"the command was: {shlex.join(argv)}"
                )
            return summary(read_json(files[-1]))


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the harness's results: values by metric and task, directions, numbers of rows, versions."""
    metrics: dict[str, dict[str, float]] = {}
    better: dict[str, bool] = {}
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float) or metric.endswith("_stderr"):
                continue
            if not filtered:  # sample_len and the like
                continue
            label = metric if filtered == "none" else name
            metrics.setdefault(label, {})[task] = float(value)
            better[label] = bool(found.get("higher_is_better", {}).get(task, {}).get(metric, True))
    samples = {task: counts["effective"] for task, counts in found.get("n-samples", {}).items()}
    return {"metrics": metrics, "higher_is_better": better, "rows": samples, "versions": found.get("versions", {})}


def harness_results(grid: Grid) -> dict[str, Any] | None:
    """What results.json says of the harness: by metric a value a model and task, and how they changed; None if it was
    never asked."""
    file = _folder(grid) / SETTINGS_FILE
    if not file.is_file():
        return None
    settings = {key: value for key, value in read_json(file).items() if key != "schema"}
    stored = {
        target.row: entry
        for target in grid.targets
        if (entry := _read(_folder(grid) / f"{target.row}.json")) is not None
        and (entry["weights"], entry["settings"]) == (target.weights, settings)
    }
    found: dict[str, Any] = {}
    for entry in stored.values():
        for metric, values in entry["metrics"].items():
            tasks = found.setdefault(metric, {"higher_is_better": entry["higher_is_better"][metric], "tasks": []})[
                "tasks"
            ]
            tasks += [task for task in values if task not in tasks]
    for metric, part in found.items():

        def row(target: Target | None, metric: str = metric, tasks: Sequence[str] = tuple(part["tasks"])) -> list[Cell]:
            entry = None if target is None else stored.get(target.row)
            values = {} if entry is None else entry["metrics"].get(metric, {})
            return [values.get(task) for task in tasks]

        part["base"], part["rows"] = row(grid.base), [row(target) for target in grid.stages]
        part |= general_ability(part["base"], part["rows"][-1], part["higher_is_better"])
    return {"settings": settings, "metrics": found}


def _folder(grid: Grid) -> Path:
    return grid.run.dir / HARNESS_DIR


def _read(file: Path) -> dict[str, Any] | None:
    value: Any = read_json(file) if file.is_file() else None
    return value if isinstance(value, dict) and value.get("schema") == HARNESS_SCHEMA else None


def _stored(grid: Grid, target: Target, key: str) -> dict[str, Any] | None:
    found = _read(_folder(grid) / f"{target.row}.json")
    return found if found is not None and found["key"] == key else None


def _write_if_new(file: Path, value: dict[str, Any]) -> None:
    if not file.is_file() or read_json(file) != value:
        write_json(file, value)


def _environment() -> dict[str, str]:
    # The client wants a key even for a server that asks for none; no proxy stands before our own server.
    return {"OPENAI_API_KEY": "none", **os.environ, "NO_PROXY": "127.0.0.1,localhost"}
