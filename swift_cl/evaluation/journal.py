"""What asking cost and how it was started: a line in `evaluations.jsonl` each time that questions were asked.

results.json holds nothing of it, so that an evaluation in three pieces gives the same file as one in one piece.
"""

import importlib.metadata
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swift_cl.evaluation.ask import Asker

JOURNAL_FILE = "evaluations.jsonl"
PACKAGES = ("swift_cl", "ms-swift", "openai")


@dataclass
class Journal:
    """What is being done.

    Attributes:
        servers: command and seconds until it was ready, of each server that was started.
        askers: those who ask; their tallies say what was asked and failed.
    """

    servers: list[dict[str, Any]] = field(default_factory=list)
    askers: list["Asker"] = field(default_factory=list)

    def server(self, command: Sequence[str], ready_seconds: float) -> None:
        """Note a server that is ready."""
        self.servers.append({"command": shlex.join(command), "ready_seconds": round(ready_seconds, 1)})


def journal_path(run_dir: Path) -> Path:
    """`evaluations.jsonl`."""
    return run_dir / JOURNAL_FILE


@contextmanager
def journal(run_dirs: Sequence[Path], backend: str) -> Iterator[Journal]:
    """Within the block questions are asked; at its end, also by an error, each run gets its line if any were.

    Args:
        backend: what generates, with its version, as in the answers' keys.
    """
    found = Journal()
    started, begin = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()

    def write() -> None:
        tallies = [tally for asker in found.askers for tally in asker.tallies]
        asked = sum(tally.asked for tally in tallies)
        row = {
            "schema": 1,
            "started": started,
            "seconds": round(time.monotonic() - begin, 1),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "runs": [run_dir.name for run_dir in run_dirs],
            "backend": backend,
            "servers": found.servers,
            "asked": asked,
            "asking_seconds": round(sum(tally.seconds for tally in tallies), 1),
            "failed": sum(len(tally.failures) for tally in tallies),
            "versions": {name: _version(name) for name in PACKAGES},
        }
        for run_dir in run_dirs if asked else ():
            _append(journal_path(run_dir), row)

    try:
        yield found
    except BaseException:
        # A full disk, the reason why asking stopped, must not hide behind a line that cannot be written.
        with suppress(OSError):
            write()
        raise
    write()


def _append(path: Path, row: dict[str, Any]) -> None:
    # One write of a whole line; half a line that a crash left is closed first.
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with open(path, "ab+") as stream:
        if stream.tell() and os.pread(stream.fileno(), 1, stream.tell() - 1) != b"\n":
            data = b"\n" + data
        stream.write(data)


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """The lines that can be read; half a line of a crash is left out, it is a record and not a result."""
    path = journal_path(run_dir)
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("schema") == 1:
            found.append(row)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
