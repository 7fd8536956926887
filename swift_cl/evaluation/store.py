"""Stored answers: one JSON line a turn, appended and flushed to disk as they arrive; the last line of a turn counts."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

from swift_cl.errors import RunFailure, UserError

Answer = dict[str, Any]
"""`id`, `turn`, `question`, `reference`, `answer` or `error`, `finish`, `served`, `weights`, `key`; `tokens` where the
endpoint tells, `routed` (the adapter that the stage's router chose) where one was chosen."""


class AnswerStore:
    """The answers of one stage to one task, in one file; safe to use from several threads.

    A crash can leave half a line at the end; it is not read, and it is cut off before the next line is written. Threads
    that wait for the disk share one flush, so that many answers a second do not wait for one flush each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._latest: dict[tuple[str, int], Answer] = {}
        self._by_key: dict[str, Answer] = {}
        self._cut_to: int | None = None
        self._sync_lock = threading.Lock()
        self._size = self._written = 0
        self._synced = self._synced_size = self._lost = 0
        if path.is_file():
            self._load()

    def _load(self) -> None:
        data = self.path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                row = json.loads(line)
                self._remember(row)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}, line {number}: not an answer ({error}); remove the line to ask again"
                ) from None
        self._cut_to = len(complete) if len(complete) < len(data) else None
        self._synced_size = len(complete)

    def _remember(self, row: Answer) -> None:
        self._latest[(str(row["id"]), int(row["turn"]))] = row
        if "answer" in row:
            self._by_key[row["key"]] = row

    def append(self, row: Answer) -> None:
        """Add a row; when this returns it is on the disk.

        Raises:
            RunFailure: the disk is full, or the file cannot be written; no half line counts.
        """
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            self._sync(self._write(line))
        except OSError as error:
            raise RunFailure(
                f"{self.path}: cannot be written ({error.strerror}); the answers before are kept, run again to continue"
            ) from None
        with self._lock:
            self._remember(row)

    def _write(self, line: bytes) -> int:
        """Append a line; its number among those of this object."""
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._cut_to is not None:
                os.truncate(self.path, self._cut_to)
                self._cut_to = None
            with open(self.path, "ab", buffering=0) as stream:
                before = os.fstat(stream.fileno()).st_size
                try:
                    rest = line
                    while rest:
                        rest = rest[stream.write(rest) or 0 :]
                except OSError:
                    self._cut_to = before  # what got through is cut off before the next line
                    raise
            self._written += 1
            self._size = before + len(line)
            return self._written

    def _sync(self, number: int) -> None:
        """Return when line `number` is on the disk; one flush serves all lines that were written before it."""
        with self._sync_lock:
            if self._synced >= number > self._lost:
                return
            if self._lost >= number:
                raise OSError(errno.EIO, "an earlier flush failed")
            with self._lock:
                target, size = self._written, self._size
            try:
                with open(self.path, "rb", buffering=0) as stream:
                    os.fsync(stream.fileno())
            except OSError:
                with self._lock:
                    self._cut_to, self._lost = self._synced_size, self._written
                raise
            self._synced, self._synced_size = target, size

    def latest(self, sample: str, turn: int) -> Answer | None:
        """The last row of a turn, or None."""
        return self._latest.get((sample, turn))

    def answered(self, key: str) -> Answer | None:
        """A row that answers exactly this request, or None."""
        return self._by_key.get(key)

    def rows(self) -> list[Answer]:
        """The last row of every turn, in the order in which the turns were first stored."""
        return list(self._latest.values())

    def __len__(self) -> int:
        return len(self._latest)


def answer_path(run_dir: Path, row_name: str, task: str) -> Path:
    """File of one cell: `answers/<base or stage folder>/<task>.jsonl`."""
    return run_dir / "answers" / row_name / f"{task}.jsonl"
