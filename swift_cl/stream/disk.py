"""What of a benchmark's data is on disk."""

from collections.abc import Iterable
from pathlib import Path

from swift_cl.errors import UserError
from swift_cl.stream.benchmark import Benchmark, Task
from swift_cl.stream.readers import needed_files


def needed(tasks: Iterable[Task]) -> dict[Path, list[str]]:
    """Every file that the tasks need, with the tasks that need it."""
    found: dict[Path, list[str]] = {}
    for task in tasks:
        files = [
            *needed_files(task.train, task.file_format, task.train_options),
            *needed_files(task.test, task.file_format, task.test_options),
            *([task.labels] if isinstance(task.labels, Path) else []),
        ]
        for file in dict.fromkeys(files):
            found.setdefault(file, []).append(task.name)
    return found


def missing(tasks: Iterable[Task]) -> dict[Path, list[str]]:
    """Those of the needed files that are not there."""
    return {file: names for file, names in needed(tasks).items() if not file.exists()}


def check_on_disk(benchmark: Benchmark, tasks: Iterable[Task]) -> None:
    """Refuse to start without the data.

    Raises:
        UserError: one line for each missing file, and one that says where the data is to be had.
    """
    absent = missing(tasks)
    if not absent:
        return
    lines = [f"{file}: data file not found (task {', '.join(names)})" for file, names in absent.items()]
    if benchmark.data_source:
        lines.append(f"where to get the data of {benchmark.name}: {benchmark.data_source}")
    raise UserError("\n".join(lines))
