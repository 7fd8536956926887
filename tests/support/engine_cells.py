"""Which cells (engine, method or tuner) of the support table were run, by the tests themselves, and how that compares.

Every test of a cell leaves its outcome in build/engine_cells.json (`note`, called from tests/conftest.py); the newest
counts. `python -m tests.support.engine_cells` prints what is declared and was not seen to pass at this commit; with
`--check` its exit code is then 1.
"""

import json
import re
import subprocess
import sys
from typing import Any

from swift_cl.io import read_json, write_json
from swift_cl.methods.registry import methods
from tests.conftest import ROOT

FILE = ROOT / "build" / "engine_cells.json"
MATRIX = re.compile(r"tests/distributed/test_engines\.py::test_two_processes_equal_one\[(\w+?)-([\w-]+)\]")
DDP = re.compile(r"tests/integration/test_two_processes\.py::test_two_processes_equal_one\[(\w+)\]")


def cell_of(test: str) -> str | None:
    """`engine method` of a test's id, None for a test that is no cell."""
    if found := MATRIX.fullmatch(test):
        return f"{found[1]} {found[2]}"
    return f"ddp {found[1]}" if (found := DDP.fullmatch(test)) else None


def note(test: str, outcome: str) -> None:
    """Remember the outcome (`passed`, `failed`, `skipped`) of a test that is a cell."""
    cell = cell_of(test)
    if cell is not None:
        seen: dict[str, Any] = read_json(FILE) if FILE.is_file() else {}
        write_json(FILE, dict(sorted({**seen, cell: {"outcome": outcome, "commit": commit()}}.items())))


def commit() -> str:
    """The commit that is checked out, `+` behind it where files differ from it."""
    git = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def declared() -> list[str]:
    """The cells that methods and tuners declare, as the matrix goes through them."""
    from tests.distributed.test_engines import cells

    return sorted([*(f"ddp {name}" for name in methods()), *(f"{engine} {cell.name}" for engine, cell in cells())])


def main(argv: list[str]) -> int:
    """Print declared cells that were not seen to pass, and cells that passed without being declared."""
    seen = read_json(FILE) if FILE.is_file() else {}
    now, wanted = commit(), declared()
    fresh = {cell for cell, run in seen.items() if run["outcome"] == "passed" and run["commit"] == now}
    missing = [cell for cell in wanted if cell not in fresh]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} declared cells passed at {now} ({FILE})")
    for cell in missing:
        print(f"  {cell}: {json.dumps(seen[cell]) if cell in seen else 'not run'}")
    for cell in sorted(fresh - set(wanted)):
        print(f"  {cell}: passed, but not declared")
    return int("--check" in argv and bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
