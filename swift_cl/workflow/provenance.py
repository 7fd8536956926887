"""What a run was made from, kept in its folder (`provenance.json`), so that `swift-cl run --from RUN_DIR` repeats it.

{"schema": 1, "config": the resolved run file with one method, order and seed; "seed": the seed; "order": task names;
 "model_id": identity of the base model's weights, "files": {path: {"bytes", "sha256"}} of benchmark and data,
 "calls": [{"started": UTC time, "mode", "outcome", "seconds": {"training", "evaluation"},
            "versions": {package: version}, "git": {"commit", "changed"} of swift_cl's checkout or null}]}

A run may take several calls. One that was killed keeps the outcome `running`. Times of single stages are in their
stage.json.
"""

import contextlib
import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from swift_cl import __version__
from swift_cl.errors import UserError
from swift_cl.io import read_json, sha256_file, sha256_json, write_json
from swift_cl.serving.adapters import weights_id
from swift_cl.stream.benchmark import Benchmark, Task
from swift_cl.stream.disk import needed
from swift_cl.workflow.config import RunConfig

PROVENANCE_FILE = "provenance.json"
PROVENANCE_SCHEMA = 1
END = 1 << 20
PACKAGES = (
    "ms-swift", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "safetensors", "deepspeed", "vllm",
)  # fmt: skip
KEYS = ("config", "seed", "order", "model_id", "files", "calls")


def versions() -> dict[str, str]:
    """Versions of Python, swift_cl and what it stands on, without importing any of it."""
    found = {"python": platform.python_version(), "swift_cl": __version__}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that swift_cl runs from, and whether tracked files differ from it; None without git."""
    folder = Path(__file__).resolve().parent

    def git(*argv: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *argv], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def fingerprint(path: Path, ends_only: bool = False) -> dict[str, Any]:
    """Size and hash of a file; of a folder those of all files in it, hashed together with their names.

    Args:
        ends_only: hash the first and the last MiB alone, for a streamed file that takes long to read.
    """
    if ends_only and path.is_file() and path.stat().st_size > 2 * END:
        with path.open("rb") as stream:
            head = stream.read(END)
            stream.seek(-END, os.SEEK_END)
            digest = hashlib.sha256(head + stream.read()).hexdigest()
        return {"bytes": path.stat().st_size, "sha256": digest, "of": "first and last MiB"}
    if path.is_file():
        return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    content = [[file.relative_to(path).as_posix(), sha256_file(file)] for file in files]
    return {"bytes": sum(file.stat().st_size for file in files), "sha256": sha256_json(content)}


def benchmark_files(benchmark: Benchmark) -> list[Path]:
    """The files that define the benchmark itself."""
    if benchmark.path.is_dir():
        return [benchmark.path / name for name in ("benchmark_info.json", "dataset_info.json")]
    return [benchmark.path]


def fingerprints(benchmark: Benchmark, tasks: Sequence[Task], streaming: bool) -> dict[str, dict[str, Any]]:
    """Fingerprints of the benchmark's definition and of every data file of the tasks, by absolute path."""
    streamed = {task.train for task in tasks} if streaming else set()
    files = (*benchmark_files(benchmark), *needed([*tasks, *benchmark.also_asked(tasks)]))
    return {str(path.resolve()): fingerprint(path, path in streamed) for path in files}


def describe(config: RunConfig, benchmark: Benchmark, order: Sequence[str]) -> dict[str, Any]:
    """What a run with this configuration (of one method, order and seed) is made from."""
    return {
        "schema": PROVENANCE_SCHEMA,
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "order": list(order),
        "model_id": weights_id(config.model),
        "files": fingerprints(benchmark, [benchmark.tasks[name] for name in order], config.streaming),
        "calls": [],
    }


def load(run_dir: Path) -> dict[str, Any]:
    """Read a run's provenance.

    Raises:
        UserError: the folder has none, or it lacks a part.
    """
    path = run_dir / PROVENANCE_FILE
    if not path.is_file():
        raise UserError(f"{run_dir}: no {PROVENANCE_FILE}; only runs that `swift-cl run` made can be repeated")
    value = read_json(path)
    if not isinstance(value, dict) or value.get("schema") != PROVENANCE_SCHEMA:
        raise UserError(f"{path}: not a provenance file of schema {PROVENANCE_SCHEMA}")
    absent = [key for key in KEYS if not value.get(key) and value.get(key) != 0]
    if absent:
        raise UserError(f"{path}: has no {', '.join(absent)}, so the run cannot be repeated")
    return value


def save(run_dir: Path, described: dict[str, Any], trained_on: Sequence[Path]) -> None:
    """Write a run's provenance; the calls that are there already stay.

    Args:
        trained_on: the files with training rows.

    Raises:
        UserError: one of them has changed since a stage of the run was trained.
    """
    path = run_dir / PROVENANCE_FILE
    old = read_json(path) if path.is_file() else {"files": {}, "calls": []}
    for file in map(str, (file.resolve() for file in trained_on)):
        had, now = old["files"].get(file), described["files"][file]
        if had is not None and had != now and any(run_dir.glob("stage_*")):
            raise UserError(
                f"{file}: has changed since {run_dir} was begun; use another output_dir, or --overwrite to start anew"
            )
    write_json(path, {**described, "calls": old["calls"]})


def check_same_inputs(recorded: dict[str, Any], benchmark: Benchmark, config: RunConfig) -> None:
    """Refuse to repeat a run with other data or another base model.

    Raises:
        UserError: a file is missing or differs, or the model does; the first one is named.
    """
    now = fingerprints(benchmark, [benchmark.tasks[name] for name in recorded["order"]], config.streaming)
    for path, had in recorded["files"].items():
        if path not in now:
            raise UserError(f"{path}: the run was made with this file, which is not part of its benchmark any more")
        if now[path] != had:
            raise UserError(
                f"{path}: differs from the file that the run was made with (sha256 {now[path]['sha256'][:12]}, was "
                f"{had['sha256'][:12]}), so the run cannot be repeated"
            )
    if weights_id(config.model) != recorded["model_id"]:
        raise UserError(f"{config.model}: the base model's weights differ from those that the run was made with")


def changes_since(recorded: dict[str, Any]) -> list[str]:
    """What of the programs differs from those that began a run, one line each: it may give other numbers."""
    first, now = recorded["calls"][0], versions()
    names = sorted(now.keys() | first["versions"].keys())
    lines = [
        f"{name} is {now.get(name, 'not installed')}, was {first['versions'].get(name, 'not installed')}"
        for name in names
        if now.get(name) != first["versions"].get(name)
    ]
    git, had = git_state(), first["git"]
    if git != had:
        lines.append(f"the checkout of swift_cl is at {_commit(git)}, was at {_commit(had)}")
    elif git and git["changed"]:
        lines.append(f"the checkout of swift_cl is at {_commit(git)}, now as then; the changes are not recorded")
    return lines


def _commit(git: dict[str, Any] | None) -> str:
    if git is None:
        return "no commit"
    return str(git["commit"])[:12] + (" with changed files" if git["changed"] else "")


class Call:
    """One call of `swift-cl run`, noted in every run it works on while it goes on."""

    def __init__(self, run_dirs: Sequence[Path], mode: str) -> None:
        self._run_dirs = run_dirs
        self.complete = True
        self._entry: dict[str, Any] = {
            "started": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "mode": mode,
            "outcome": "running",
            "seconds": {},
            "versions": versions(),
            "git": git_state(),
        }

    def write(self) -> None:
        """Put the present state into the runs' files; a run without one (made by a recipe) gets none."""
        for run_dir in self._run_dirs:
            path = run_dir / PROVENANCE_FILE
            if path.is_file():
                value = read_json(path)
                others = [entry for entry in value["calls"] if entry["started"] != self._entry["started"]]
                write_json(path, {**value, "calls": [*others, self._entry]})

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the work."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._entry["seconds"][name] = round(time.monotonic() - begun, 1)

    def end(self, outcome: str) -> None:
        """The last word on this call."""
        self._entry["outcome"] = outcome
        self.write()


@contextlib.contextmanager
def noted(run_dirs: Sequence[Path], mode: str) -> Iterator[Call]:
    """Note a call in its runs: when it began, how long its parts took, how it ended."""
    call = Call(run_dirs, mode)
    call.write()
    try:
        yield call
    except BaseException as error:
        call.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    call.end("done" if call.complete else "incomplete")
